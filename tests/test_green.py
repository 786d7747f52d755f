from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.local import Local
from django.utils import timezone, translation

from tornjango import green

colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")


@pytest.fixture(autouse=True)
def _serving() -> Iterator[None]:
    green.serve()
    yield
    green.stop_serving()


def _inside() -> tuple[bool, bool, int]:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        has_loop = False
    else:
        has_loop = True
    return green.active(), has_loop, threading.get_ident()


@pytest.mark.gen_test
async def test_code_runs_on_the_loops_thread_and_sees_no_loop() -> None:
    assert await green.run(_inside) == (True, False, threading.get_ident())
    assert _inside() == (False, True, threading.get_ident())


@pytest.mark.gen_test
async def test_others_run_while_it_waits() -> None:
    order: list[str] = []
    gate = asyncio.Event()

    def waits() -> str:
        order.append("waits")
        green.wait(gate.wait())
        order.append("goes on")
        return "done"

    async def opens() -> None:
        order.append("opens")
        gate.set()

    result, _ = await asyncio.gather(green.run(waits), opens())
    assert (result, order) == ("done", ["waits", "opens", "goes on"])


@pytest.mark.gen_test
async def test_what_is_awaited_gives_its_value_or_raises() -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise KeyError("x")

    def code(argument: int, *, named: int) -> Any:
        try:
            green.wait(fails())
        except KeyError as exc:
            return argument + named, exc.args, green.wait(asyncio.sleep(0, "slept"))

    assert await green.run(code, 1, named=2) == (3, ("x",), "slept")


@pytest.mark.gen_test
async def test_what_it_raises_is_raised_to_who_awaits_it() -> None:
    def fails() -> None:
        green.wait(asyncio.sleep(0))
        raise ZeroDivisionError

    for _ in range(3):  # the greenlet is as good as new after it
        with pytest.raises(ZeroDivisionError):
            await green.run(fails)
        assert await green.run(_inside) == (True, False, threading.get_ident())


@pytest.mark.gen_test
async def test_waiting_is_for_green_code_only() -> None:
    for awaitable in (asyncio.sleep(0), asyncio.get_running_loop().create_future()):
        with pytest.raises(RuntimeError, match=r"green\.run"):
            green.wait(awaitable)


@pytest.mark.gen_test
async def test_context_variables_are_its_callers() -> None:
    local = Local()

    def code() -> tuple[str, str, str | None]:
        seen = colour.get(), local.colour, translation.get_language()
        green.wait(asyncio.sleep(0))
        colour.set("green")
        local.colour = "green"
        translation.activate("de")
        return seen

    colour.set("blue")
    local.colour = "blue"
    with translation.override("fr"):
        assert await green.run(code) == ("blue", "blue", "fr")
        assert (colour.get(), local.colour, translation.get_language()) == ("green", "green", "de")


@pytest.mark.gen_test
async def test_two_at_once_have_contexts_of_their_own() -> None:
    def code(name: str) -> str:
        colour.set(name)
        green.wait(asyncio.sleep(0))
        return colour.get()

    names = [str(number) for number in range(200)]
    assert await asyncio.gather(*(green.run(code, name) for name in names)) == names
    assert colour.get() == "none"


@pytest.mark.gen_test
async def test_green_code_may_wait_for_more_green_code() -> None:
    def inner(depth: int) -> int:
        green.wait(asyncio.sleep(0))
        return depth if depth == 20 else green.wait(green.run(inner, depth + 1))

    assert await green.run(inner, 0) == 20


@pytest.mark.gen_test
async def test_cancellation_is_met_where_it_waits() -> None:
    seen: list[str] = []

    def code() -> None:
        try:
            green.wait(asyncio.Event().wait())
        except asyncio.CancelledError:
            green.wait(asyncio.sleep(0))
            seen.append("cleaned up")
            raise

    task = asyncio.ensure_future(green.run(code))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["cleaned up"]


@pytest.mark.gen_test
async def test_a_time_out_ends_it() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await green.run(lambda: green.wait(asyncio.Event().wait()))


@pytest.mark.gen_test
async def test_what_is_shielded_is_finished_before_it_is_cancelled() -> None:
    seen: list[str] = []
    started, gate = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        await gate.wait()
        seen.append("finished")

    def code() -> None:
        with green.shielded():
            green.wait(work())
            green.wait(asyncio.sleep(0))
            seen.append("left")
        try:
            green.wait(asyncio.sleep(0))
        finally:
            seen.append("after")

    task = asyncio.ensure_future(green.run(code))
    await started.wait()
    task.cancel()
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["finished", "left", "after"]


@pytest.mark.gen_test
async def test_a_cancellation_during_the_last_shielded_wait_is_not_lost() -> None:
    started, gate = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        await gate.wait()

    def code() -> None:
        with green.shielded():
            green.wait(work())

    task = asyncio.ensure_future(green.run(code))
    await started.wait()
    task.cancel()
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.gen_test
async def test_what_computes_goes_to_a_thread() -> None:
    @green.blocking
    def computes(number: int) -> tuple[int, bool, str]:
        return number, threading.get_ident() == here, colour.get()

    here = threading.get_ident()
    colour.set("blue")
    assert await green.run(computes, 1) == (1, False, "blue")
    assert computes(2) == (2, True, "blue")
    with pytest.raises(ZeroDivisionError):
        await green.run(green.aside, lambda: 1 / 0)


@pytest.mark.gen_test
async def test_a_thread_aside_has_the_language_and_the_time_zone_of_who_calls() -> None:
    def code() -> tuple[str | None, str]:
        with translation.override("de"), timezone.override("Asia/Tokyo"):
            return green.aside(
                lambda: (translation.get_language(), timezone.get_current_timezone_name())
            )

    assert await green.run(code) == ("de", "Asia/Tokyo")


class _Held:
    def __init__(self, name: str, released: list[str]) -> None:
        self.name = name
        self.released = released

    def release(self) -> None:
        self.released.append(self.name)


@pytest.mark.gen_test
async def test_a_scope_is_shared_by_calls_within_calls_and_releases_at_the_end() -> None:
    released: list[str] = []

    def hold(name: str) -> Any:
        scope = green.current()
        assert scope is not None
        scope.resources[name] = _Held(name, released)
        return scope

    def outer() -> bool:
        scope = hold("outer")
        same = green.wait(green.run(hold, "inner")) is scope
        assert released == []
        return same

    assert await green.run(outer)
    assert released == ["inner", "outer"]
    assert green.current() is None


@pytest.mark.gen_test
async def test_another_task_has_another_scope() -> None:
    def outer() -> Any:
        async def in_task() -> Any:
            return await asyncio.create_task(green.run(green.current))

        return green.current(), green.wait(in_task())

    own, others = await green.run(outer)
    assert others is not own
    assert others.outer is own


@pytest.mark.gen_test
async def test_nothing_of_a_call_is_kept() -> None:
    class Thing:
        pass

    def code(thing: Thing) -> Thing:
        green.wait(asyncio.sleep(0))
        return thing

    def fails(thing: Thing) -> None:
        green.wait(asyncio.sleep(0))
        raise ValueError(thing)

    thing = Thing()
    gone = weakref.ref(thing)
    gc.collect()
    gc.disable()
    try:
        await green.run(code, thing)
        with pytest.raises(ValueError, match="Thing"):
            await green.run(fails, thing)
        del thing
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.gen_test
async def test_a_lock_is_its_owners_to_take_again() -> None:
    lock = green.TaskLock()
    order: list[str] = []

    async def other() -> None:
        async with lock:
            order.append("other")

    async with lock:
        task = asyncio.create_task(other())
        async with lock:
            await asyncio.sleep(0)
            order.append("inner")
        await asyncio.sleep(0)
        order.append("outer")
    await task
    assert order == ["inner", "outer", "other"]


@pytest.mark.gen_test
async def test_where_nothing_is_served_it_runs_in_a_thread() -> None:
    green.stop_serving()
    active, has_loop, thread = await green.run(_inside)
    assert (active, has_loop, thread == threading.get_ident()) == (False, False, False)


@pytest.mark.gen_test
async def test_another_loop_than_the_servers_is_not_served() -> None:
    other = asyncio.new_event_loop()
    green.serve(other)
    assert not green.is_served()
    assert (await green.run(_inside))[2] != threading.get_ident()
    green.serve(asyncio.get_running_loop())
    assert await green.run(_inside) == (True, False, threading.get_ident())
    other.close()
