from __future__ import annotations

from typing import Any

from django.contrib.postgres import fields as postgres
from django.core.serializers.json import DjangoJSONEncoder
from django.db import models


class Blog(models.Model):
    name = models.CharField(max_length=100)


class CuriousBlog(Blog):
    """Queries for each object that is made."""

    class Meta:
        proxy = True

    @classmethod
    def from_db(cls, db: Any, field_names: Any, values: Any, **options: Any) -> Any:
        made: Any = super().from_db(db, field_names, values, **options)
        made.neighbours = Blog.objects.using(db).count()
        return made


class Author(models.Model):
    name = models.CharField(max_length=100)
    email = models.EmailField(blank=True)


class Tag(models.Model):
    slug = models.SlugField(unique=True)


class EntryManager(models.Manager):
    def published(self) -> models.QuerySet[Entry]:
        return self.filter(pubdate__isnull=False)


class Entry(models.Model):
    blog = models.ForeignKey(Blog, models.CASCADE, related_name="entries")
    authors = models.ManyToManyField(Author, related_name="entries")
    tag = models.ManyToManyField(Tag, related_name="entries")
    editor = models.ForeignKey(Author, models.SET_NULL, null=True, related_name="edited")
    title = models.CharField(max_length=200)
    body = models.TextField(blank=True)
    pubdate = models.DateTimeField(null=True)
    rating = models.IntegerField(default=0)

    objects = EntryManager()

    class Meta:
        ordering = ("pk",)


class Draft(Entry):
    """Inherits over a join."""

    reason = models.CharField(max_length=100)


class Upper(models.CharField):
    """Converts what the database gives."""

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> Any:
        return value and value.upper()


class Everything(models.Model):
    """A field of every type that Django and django.contrib.postgres have, but those that need an extension."""

    big = models.BigIntegerField(null=True)
    binary = models.BinaryField(null=True)
    boolean = models.BooleanField(null=True)
    char = models.CharField(max_length=100, null=True)
    upper = Upper(max_length=100, null=True)
    date = models.DateField(null=True)
    moment = models.DateTimeField(null=True)
    decimal = models.DecimalField(max_digits=20, decimal_places=6, null=True)
    duration = models.DurationField(null=True)
    file = models.FileField(null=True)
    floating = models.FloatField(null=True)
    ip = models.GenericIPAddressField(null=True)
    integer = models.IntegerField(null=True)
    json = models.JSONField(null=True, encoder=DjangoJSONEncoder)
    small = models.SmallIntegerField(null=True)
    text = models.TextField(null=True)
    time = models.TimeField(null=True)
    url = models.URLField(null=True)
    uuid = models.UUIDField(null=True)
    texts = postgres.ArrayField(models.CharField(max_length=100), null=True)
    grid = postgres.ArrayField(postgres.ArrayField(models.IntegerField(null=True)), null=True)
    moments = postgres.ArrayField(models.DateTimeField(), null=True)
    uuids = postgres.ArrayField(models.UUIDField(), null=True)
    ips = postgres.ArrayField(models.GenericIPAddressField(), null=True)
    decimals = postgres.ArrayField(models.DecimalField(max_digits=10, decimal_places=2), null=True)
    jsons = postgres.ArrayField(models.JSONField(), null=True)
    integers = postgres.IntegerRangeField(null=True)
    bigs = postgres.BigIntegerRangeField(null=True)
    numbers = postgres.DecimalRangeField(null=True)
    dates = postgres.DateRangeField(null=True)
    period = postgres.DateTimeRangeField(null=True)
    reference = models.ForeignKey("self", models.SET_NULL, null=True)

    class Meta:
        ordering = ("pk",)
        required_db_vendor = "postgresql"


class Place(models.Model):
    """A primary key of two columns."""

    pk = models.CompositePrimaryKey("country", "number")
    country = models.CharField(max_length=2)
    number = models.IntegerField()
    name = models.CharField(max_length=100)
