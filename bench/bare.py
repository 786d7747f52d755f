"""Tornado without Django: the floor that its own HTTP server and a handler set."""

from __future__ import annotations

import asyncio
import json
import sys

import tornado.web

waiting: set[asyncio.Future[str]] = set()


class Greeting(tornado.web.RequestHandler):
    def get(self) -> None:
        self.set_header("Content-Type", "application/json")
        self.write(b'{"message": "Hello, world!"}')


class Poll(tornado.web.RequestHandler):
    """Parks in a Future until something is published."""

    future: asyncio.Future[str]

    async def get(self) -> None:
        self.future = asyncio.get_running_loop().create_future()
        waiting.add(self.future)
        try:
            self.write(await self.future)
        except asyncio.CancelledError:
            return
        finally:
            waiting.discard(self.future)

    def on_connection_close(self) -> None:
        self.future.cancel()


class Publish(tornado.web.RequestHandler):
    def get(self) -> None:
        text = json.dumps({"messages": [{"data": {"text": "something happened"}}], "cursor": "1"})
        for future in list(waiting):
            if not future.done():
                future.set_result(text)
        self.write({})


class Cursor(tornado.web.RequestHandler):
    def get(self) -> None:
        self.write({"cursor": "0"})


class Status(tornado.web.RequestHandler):
    def get(self) -> None:
        self.write({"parked": len(waiting)})


async def main() -> None:
    routes = [
        ("/bare/json/", Greeting),
        ("/bare/poll/", Poll),
        ("/bare/publish/", Publish),
        ("/bare/cursor/", Cursor),
        ("/bare/status/", Status),
    ]
    tornado.web.Application(routes).listen(int(sys.argv[1]), "127.0.0.1")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
