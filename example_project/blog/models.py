from __future__ import annotations

from django.contrib.postgres.indexes import GinIndex
from django.contrib.postgres.search import SearchVector
from django.db import models
from django.urls import reverse
from django.utils import timezone

# The index and the search must have one and the same expression, or PostgreSQL does not use the index.
SEARCHED = SearchVector("title", "summary", "body", config="english")


class Author(models.Model):
    name = models.CharField(max_length=100)
    slug = models.SlugField(max_length=100, unique=True)
    about = models.CharField(max_length=200, blank=True)

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        return reverse("author", args=[self.slug])


class Blog(models.Model):
    """An entry. The name is that of the message of 2009 that started tornjango."""

    title = models.CharField(max_length=200)
    slug = models.SlugField(max_length=200, unique=True)
    pubdate = models.DateTimeField("published", default=timezone.now, db_index=True)
    summary = models.CharField(max_length=400)
    body = models.TextField()
    author = models.ForeignKey(Author, models.PROTECT)

    class Meta:
        verbose_name = "entry"
        verbose_name_plural = "entries"
        ordering = ["-pubdate"]
        indexes = [GinIndex(SEARCHED, name="blog_search")]

    def __str__(self) -> str:
        return self.title

    def get_absolute_url(self) -> str:
        return reverse("entry", args=[self.slug])


class Tag(models.Model):
    name = models.CharField(max_length=50)
    slug = models.SlugField(unique=True)
    blogs = models.ManyToManyField(Blog, related_name="tags", related_query_name="tag", blank=True)

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        return reverse("tag", args=[self.slug])


class Comment(models.Model):
    blog = models.ForeignKey(Blog, models.CASCADE, related_name="comments")
    name = models.CharField(max_length=60)
    text = models.TextField("comment", max_length=2000)
    created = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["created"]
        indexes = [models.Index(fields=["blog", "created"], name="blog_comments")]

    def __str__(self) -> str:
        return f"{self.name}: {self.text[:40]}"


class Cell(models.Model):
    """A painted square of the wall."""

    x = models.PositiveSmallIntegerField()
    y = models.PositiveSmallIntegerField()
    colour = models.PositiveSmallIntegerField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["x", "y"], name="blog_cell_place")]

    def __str__(self) -> str:
        return f"{self.x}, {self.y}: {self.colour}"
