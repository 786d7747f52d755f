"""The models of the 2009 message: blogs by year, with tags."""

from __future__ import annotations

from django.db import models


class Blog(models.Model):
    title = models.CharField(max_length=200)
    slug = models.SlugField(max_length=200, unique=True)
    summary = models.TextField()
    body = models.TextField()
    pubdate = models.DateTimeField(unique=True)

    class Meta:
        # A total order, so that every server's page can be compared byte for byte.
        ordering = ("-pubdate",)

    def __str__(self) -> str:
        return self.title


class Tag(models.Model):
    slug = models.SlugField(unique=True)
    blogs = models.ManyToManyField(Blog)

    def __str__(self) -> str:
        return self.slug
