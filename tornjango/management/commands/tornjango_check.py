"""``tornjango check``: what is wrong for tornjango in a project, and what costs it threads."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from argparse import ArgumentParser
from typing import Any

from django.core.checks import CheckMessage
from django.core.management.base import BaseCommand

from tornjango import checks
from tornjango.advice import Advice, Section, advise
from tornjango.conf import get_config

WIDTH = 100


class Command(BaseCommand):
    help = (
        "Says what in this project is wrong for tornjango, costs worker threads or blocks, and what to do about it. "
        "It connects to nothing. Exits with 1 for errors; what merely costs something is no error."
    )
    requires_system_checks = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="Writes one JSON object.")

    def handle(self, *args: Any, **options: Any) -> None:
        found = checks.run()
        errors = [message for message in found if message.is_serious()]
        # Of settings that are wrong nothing can be said.
        broken = any(message.id == checks.WRONG_SETTINGS for message in errors)
        sections = [] if broken else advise(get_config())
        if options["json"]:
            self.stdout.write(json.dumps(_as_json(found, sections), indent=2))
        else:
            self._write(found, sections)
        if errors:
            raise SystemExit(1)

    def _write(self, found: list[CheckMessage], sections: list[Section]) -> None:
        if found:
            self._title("Settings")
            for message in found:
                style = self.style.ERROR if message.is_serious() else self.style.WARNING
                self._advice(Advice(f"({message.id}) {message.msg}", message.hint or ""), style)
        for section in sections:
            self._title(section.title)
            for advice in section.advice:
                self._advice(advice, self.style.WARNING if advice.do else str)
        costs = sum(bool(advice.do) for section in sections for advice in section.advice)
        errors = sum(message.is_serious() for message in found)
        warnings = len(found) - errors
        self.stdout.write(f"\nErrors: {errors}. Warnings: {warnings}. Could be better: {costs}.")

    def _title(self, title: str) -> None:
        self.stdout.write(self.style.MIGRATE_HEADING(title))

    def _advice(self, advice: Advice, style: Any) -> None:
        mark = "!" if advice.do else "-"
        self.stdout.write(style(_filled(f"  {mark} ", advice.fact)))
        if advice.do:
            self.stdout.write(_filled("    > ", advice.do))


def _filled(indent: str, text: str) -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=" " * len(indent),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _as_json(found: list[CheckMessage], sections: list[Section]) -> dict[str, Any]:
    return {
        "checks": [
            {"id": m.id, "error": m.is_serious(), "message": str(m.msg), "hint": m.hint}
            for m in found
        ],
        "sections": [dataclasses.asdict(section) for section in sections],
    }
