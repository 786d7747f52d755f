from __future__ import annotations

from django.db import models


class Item(models.Model):
    name = models.CharField(max_length=30, unique=True)
    price = models.DecimalField(max_digits=8, decimal_places=2, default=0)
    since = models.DateField(null=True, blank=True)
    sheet = models.FileField(upload_to="sheets", blank=True)

    class Meta:
        app_label = "extra"
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name
