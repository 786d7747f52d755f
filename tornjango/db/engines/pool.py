from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from django.db.utils import OperationalError

from tornjango.db.engines.backoff import Backoff
from tornjango.db.engines.gate import Gate


class Pooled(Protocol):
    def is_alive(self) -> bool:
        """Whether an idle connection is good for its next user, as far as can be told without asking the server."""

    def is_idle(self) -> bool:
        """Whether it is open, and left as it was lent: without a transaction."""

    def discard(self) -> None:
        """Closes it at once."""


C = TypeVar("C", bound=Pooled)


class Pool(Generic[C]):
    """Connections that are opened as they are needed, at most as many as the gate lets in, and kept.

    Whoever waits for a connection has an attempt to connect under way for it, but takes what another gives back
    meanwhile. An attempt goes on when its caller has left. Attempts after a failed one wait for the `Backoff`.

    ``connect`` opens a connection, or raises; its errors are told to callers, each a copy of its own.
    """

    def __init__(self, gate: Gate, connect: Callable[[], Awaitable[C]]) -> None:
        self._gate = gate
        self._connect = connect
        self._loop = asyncio.get_running_loop()
        self._backoff = Backoff()
        self._connected_before = False
        self._free: list[C] = []
        self._busy: set[C] = set()
        self._waiters: deque[asyncio.Future[C]] = deque()
        self._attempts: set[asyncio.Task[None]] = set()
        self._last_error: Exception | None = None
        self._closed: type[Exception] | None = None

    @property
    def busy(self) -> list[C]:
        """Those that were acquired and not released yet."""
        return list(self._busy)

    async def acquire(self) -> C:
        """A connection that is alive, to be given to `release`.

        Raises Overloaded when others hold them all for too long. While the server is away it waits until the gate's
        time-out, then raises what connecting raised; at once, if there never was a connection.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            raise RuntimeError(
                f"The pool of {self._gate.name} belongs to another event loop: "
                "await pools.close() there, before it ends."
            )
        deadline = loop.time() + self._gate.timeout
        await self._gate.enter()
        try:
            connection = self._take() or await self._wait(deadline)
        except BaseException:
            self._gate.leave()
            raise
        self._busy.add(connection)
        return connection

    def release(self, connection: C) -> None:
        """One that is not idle is closed."""
        self._busy.remove(connection)
        if connection.is_idle():
            self._offer(connection)
        else:
            connection.discard()
        self._gate.leave()

    async def close(self, error: type[Exception]) -> None:
        """Closes the connections that are not in use; the others are closed when they are released.

        Whoever waits gets an ``error``. The gate is its owner's to close, before.
        """
        self._closed = error
        for future in self._waiters:
            if not future.done():
                future.set_exception(self._closed_error())
        attempts = list(self._attempts)
        for attempt in attempts:
            attempt.cancel()
        await asyncio.gather(*attempts, return_exceptions=True)
        while self._free:
            self._free.pop().discard()

    def counts(self) -> dict[str, int]:
        return {"free": len(self._free), "connecting": len(self._attempts)}

    def _take(self) -> C | None:
        """The one used last: those that are not needed are left alone."""
        while self._free:
            connection = self._free.pop()
            if connection.is_alive():
                return connection
            connection.discard()
        return None

    async def _wait(self, deadline: float) -> C:
        while not self._closed:
            try:
                async with asyncio.timeout_at(deadline):
                    return await self._next()
            except TimeoutError:
                raise self._late() from None
            except Exception:
                if self._closed:
                    break
                if not self._connected_before or self._loop.time() >= deadline:
                    raise
        raise self._closed_error()

    async def _next(self) -> C:
        """The next connection that is offered; raises what an attempt to connect has raised."""
        future: asyncio.Future[C] = self._loop.create_future()
        self._waiters.append(future)
        if len(self._attempts) < len(self._waiters):
            self._start_attempt()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and not future.exception():
                # Given one and cancelled in the same turn of the loop.
                self._offer(future.result())
            raise
        finally:
            if future in self._waiters:
                self._waiters.remove(future)

    def _offer(self, connection: C) -> None:
        if self._closed:
            connection.discard()
            return
        waiter = self._first_waiter()
        if waiter is None:
            self._free.append(connection)
        else:
            waiter.set_result(connection)

    def _first_waiter(self) -> asyncio.Future[C] | None:
        while self._waiters:
            future = self._waiters.popleft()
            if not future.done():
                return future
        return None

    def _start_attempt(self) -> None:
        task = self._loop.create_task(self._attempt())
        self._attempts.add(task)
        task.add_done_callback(self._attempts.discard)

    async def _attempt(self) -> None:
        task = asyncio.current_task()
        assert task
        try:
            await self._backoff.wait()
            connection = await self._connect()
        except Exception as exc:  # noqa: BLE001 - it is raised where it is waited for
            self._attempts.discard(task)
            self._failed(exc)
            return
        # No longer counted when somebody else looks for an attempt that is under way.
        self._attempts.discard(task)
        self._backoff.succeeded()
        self._connected_before = True
        self._last_error = None
        self._offer(connection)

    def _failed(self, exc: Exception) -> None:
        self._backoff.failed()
        self._last_error = exc
        waiter = self._first_waiter()
        if waiter is not None:
            waiter.set_exception(self._copy(exc))

    def _copy(self, exc: Exception) -> Exception:
        """Each caller adds a traceback of its own to what it raises."""
        try:
            copy = type(exc)(*exc.args)
        except TypeError:
            # Of a class that is made of something else: a receiver of connection_created may raise anything.
            return exc
        copy.__cause__ = exc.__cause__
        return copy

    def _late(self) -> Exception:
        if self._last_error is not None:
            return self._copy(self._last_error)
        return OperationalError(
            f"The server of {self._gate.name} took no connection within {self._gate.timeout:g} seconds."
        )

    def _closed_error(self) -> Exception:
        assert self._closed
        return self._closed(f"The pool of {self._gate.name} is closed.")
