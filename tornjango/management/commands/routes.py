"""``routes``: the table of what answers which URL."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand

from tornjango.green import runs_green
from tornjango.routing import Route, Routes
from tornjango.views import Kind, kind_of, methods_of, view_name

HEADINGS = ("Pattern", "Name", "View", "Kind")


class Command(BaseCommand):
    help = "Lists the project's routes: pattern, name, view, and how the view is called."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("contains", nargs="?", default="", help="Only routes with this text.")

    def handle(self, *args: Any, contains: str, **options: Any) -> None:
        rows = [row for row in map(_row, Routes()) if any(contains in cell for cell in row)]
        widths = [max(len(cell) for cell in column) for column in zip(HEADINGS, *rows, strict=True)]
        for row in (HEADINGS, *rows):
            line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self.stdout.write(line.rstrip())


def _row(route: Route) -> tuple[str, str, str, str]:
    return f"/{route.pattern}", route.name, view_name(route.callback), kind(route)


def kind(route: Route) -> str:
    if route.is_handler:
        return "tornado"
    view, groups = route.callback, route.groups
    sync = "green" if runs_green(view) else "sync"
    kinds = {name: _word(kind_of(fn, groups), sync) for name, fn in methods_of(view).items()}
    if len(set(kinds.values())) > 1:
        return ", ".join(f"{kind} ({method})" for method, kind in kinds.items())
    return next(iter(kinds.values()), _word(kind_of(view, groups), sync))


def _word(kind: Kind, sync: str) -> str:
    return sync if kind is Kind.SYNC else kind.value
