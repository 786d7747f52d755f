"""The wall: everybody paints on it, at once. Each page has a brush, a WebSocket of its own, and follows what all paint."""

from __future__ import annotations

import json
from typing import Any

from django.http import HttpRequest, HttpResponse

from tornjango import comet, websockets
from tornjango.shortcuts import arender

from .models import Cell

WIDTH, HEIGHT = 40, 24
COLOURS = 8


async def page(request: HttpRequest) -> HttpResponse:
    cells = [[cell.x, cell.y, cell.colour] async for cell in Cell.objects.all()]
    return await arender(
        request, "blog/wall.html", {"wall": {"width": WIDTH, "height": HEIGHT, "cells": cells}}
    )


async def brush(request: HttpRequest) -> HttpResponse:
    """Takes ``[x, y, colour]``; what is painted is on the wall before anybody hears of it."""

    async def talk(socket: websockets.WebSocket) -> None:
        async for message in socket:
            cell = parse(message)
            if cell is None:
                socket.close(1008, "A cell is [x, y, colour], all within the wall.")
                return
            x, y, colour = cell
            await Cell.objects.aupdate_or_create(x=x, y=y, defaults={"colour": colour})
            await comet.apublish("wall", cell)

    return websockets.accept(request, talk, max_message=100, frames_per_second=60)


def parse(message: str | bytes) -> list[int] | None:
    try:
        cell: Any = json.loads(message)
    except ValueError:
        return None
    if (
        not isinstance(cell, list)
        or len(cell) != 3
        or any(type(value) is not int for value in cell)
    ):
        return None
    within = all(
        0 <= value < most for value, most in zip(cell, (WIDTH, HEIGHT, COLOURS), strict=True)
    )
    return cell if within else None
