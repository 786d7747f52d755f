from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand
from django.db import transaction
from django.utils import timezone
from django.utils.text import slugify

from blog import sample_words as sample
from blog.models import Author, Blog, Comment, Tag

BATCH = 500


class Command(BaseCommand):
    help = "Fills an empty blog with entries from 2004 until today, the same ones on every machine."

    def handle(self, **options: Any) -> None:
        if loaded := Blog.objects.count():
            self.stdout.write(f"The blog has {loaded} entries already; none were added.")
        else:
            with transaction.atomic():
                self.load()
        if settings.DEBUG:
            self.create_admin()

    def load(self) -> None:
        """A few seconds, nearly all of them PostgreSQL's own: it indexes every word for the search."""
        authors = [
            Author(name=name, slug=slugify(name), about=about)
            for name, about in sample.AUTHORS.items()
        ]
        tags = [Tag(name=name, slug=slugify(name)) for name in sample.TOPICS]
        drafts = list(Writer(authors, tags).drafts(until=timezone.now()))
        self.save("authors", authors)
        self.save("tags", tags)
        self.save("entries", [draft.entry for draft in drafts])
        through = Tag.blogs.through
        self.save(
            "tags of entries",
            [through(tag=tag, blog=draft.entry) for draft in drafts for tag in draft.tags],
        )
        self.save("comments", [comment for draft in drafts for comment in draft.comments])

    def save(self, name: str, objects: list[Any]) -> None:
        for start in range(0, len(objects), BATCH):
            type(objects[0]).objects.bulk_create(objects[start : start + BATCH])
            self.show_progress(name, min(start + BATCH, len(objects)), len(objects))

    def show_progress(self, name: str, done: int, total: int) -> None:
        if self.stdout.isatty():
            bar = ("█" * (30 * done // total)).ljust(30, "░")
            self.stdout.write(f"\r{name:>16} {bar} {done:>5}", ending="\n" if done == total else "")
            self.stdout.flush()
        elif done == total:
            self.stdout.write(f"Loaded {total} {name}.")

    def create_admin(self) -> None:
        """DEBUG only: everybody knows this password."""
        users = get_user_model()._default_manager
        if not users.filter(username="admin").exists():
            users.create_superuser("admin", "admin@example.com", "admin")
            self.stdout.write("Made the user admin with the password admin, as DEBUG is on.")


@dataclass
class Draft:
    entry: Blog
    tags: list[Tag]
    comments: list[Comment]


class Writer:
    """Writes the same entries on every machine: whatever is random comes from one seed, in order of time."""

    def __init__(self, authors: list[Author], tags: list[Tag]) -> None:
        self.authors = authors
        self.tags = tags
        self.random = random.Random(2009)
        self.titles: set[str] = set()

    def drafts(self, until: datetime) -> Iterator[Draft]:
        pubdate = datetime(2004, 1, 5, 8, tzinfo=UTC)
        while pubdate < until:
            yield self.draft(pubdate, until)
            pace = timedelta(days=365) / sample.ENTRIES.get(pubdate.year, 150)
            pubdate += pace * self.random.uniform(0.3, 1.7)

    def draft(self, pubdate: datetime, until: datetime) -> Draft:
        tags = self.random.sample(self.tags, k=self.random.choice([1, 1, 2, 2, 3]))
        title, words = self.title(tags[0])
        entry = Blog(
            title=title,
            slug=slugify(title),
            pubdate=pubdate,
            summary=self.random.choice(sample.SUMMARIES).format(**words),
            body=f"{self.body(tags, words)} {self.aside(title, tags[0])}",
            author=self.random.choice(self.authors),
        )
        comments = list(self.comments(entry, words))
        return Draft(entry, tags, [comment for comment in comments if comment.created < until])

    def aside(self, title: str, tag: Tag) -> str:
        """Names the topic, so that a search for it finds the entry."""
        return sample.ASIDES[len(title) % len(sample.ASIDES)].format(topic=tag.name.lower())

    def title(self, tag: Tag) -> tuple[str, dict[str, str]]:
        """A title that no other entry has, and the words it was made with."""
        while True:
            words = self.words(tag)
            title = self.random.choice(sample.TITLES).format(**words)
            if title not in self.titles:
                self.titles.add(title)
                return title, words

    def words(self, tag: Tag) -> dict[str, str]:
        """What an entry is about; ``{the}`` within a sentence, ``{The}`` at its beginning."""
        thing = self.random.choice(sample.TOPICS[tag.name].things)
        words = {
            "a": thing,
            "the": "the " + thing.split(" ", 1)[1],
            "place": self.random.choice(sample.PLACES),
            "person": self.random.choice(sample.PEOPLE),
            "season": self.random.choice(sample.SEASONS),
        }
        return words | {key.capitalize(): word[0].upper() + word[1:] for key, word in words.items()}

    def body(self, tags: list[Tag], words: dict[str, str]) -> str:
        """Paragraphs, divided by empty lines; no sentence comes twice."""
        own = [line for tag in tags for line in sample.TOPICS[tag.name].sentences]
        general = self.random.sample(sample.SENTENCES, k=self.random.randint(6, 14))
        sentences = self.random.sample(own + general, k=len(own + general))
        sentences = [
            self.random.choice(sample.OPENINGS),
            *sentences,
            self.random.choice(sample.CLOSINGS),
        ]
        paragraphs = []
        while sentences:
            length = self.random.randint(2, 5)
            paragraphs.append(" ".join(sentences[:length]).format(**words))
            del sentences[:length]
        return "\n\n".join(paragraphs)

    def comments(self, entry: Blog, words: dict[str, str]) -> Iterator[Comment]:
        created = entry.pubdate
        for text in self.random.sample(
            sample.COMMENTS, k=self.random.choice([0, 0, 1, 1, 2, 2, 3, 4, 6])
        ):
            created += timedelta(hours=self.random.expovariate(1 / 20))
            name = self.random.choice(sample.READERS)
            yield Comment(blog=entry, name=name, text=text.format(**words), created=created)
