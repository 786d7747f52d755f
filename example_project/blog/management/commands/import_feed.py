from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from blog.importing import NoFeed, import_feed


class Command(BaseCommand):
    help = "Takes in the entries of a JSON feed. The page /import/ shows how far it is, in any browser of the staff's."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("file", help="a JSON feed; - is standard input")

    def handle(self, *, file: str, **options: Any) -> None:
        try:
            text = sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")
        except OSError as error:
            raise CommandError(str(error)) from error
        try:
            self.stdout.write(f"{import_feed(text)} entries are there.")
        except NoFeed as error:
            raise CommandError(str(error)) from error
