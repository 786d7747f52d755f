from __future__ import annotations

from django.contrib import admin

from tests.applications.extra.models import Item


@admin.action(description="Make free")
def make_free(modeladmin, request, queryset):  # type: ignore[no-untyped-def]
    count = queryset.update(price=0)
    modeladmin.message_user(request, f"{count} are free now.")


@admin.register(Item)
class ItemAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    list_display = ["name", "price", "since"]
    list_editable = ["price"]
    list_filter = ["since"]
    search_fields = ["name"]
    date_hierarchy = "since"
    actions = [make_free]
