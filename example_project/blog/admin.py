from django.contrib import admin

from .models import Author, Blog, Comment, Tag


class TagInline(admin.TabularInline):
    model = Tag.blogs.through
    autocomplete_fields = ["tag"]
    extra = 1


@admin.register(Blog)
class BlogAdmin(admin.ModelAdmin):
    list_display = ["title", "author", "pubdate"]
    list_filter = ["pubdate", "tag"]
    list_select_related = ["author"]
    date_hierarchy = "pubdate"
    search_fields = ["title", "summary"]
    prepopulated_fields = {"slug": ["title"]}
    inlines = [TagInline]


@admin.register(Author)
class AuthorAdmin(admin.ModelAdmin):
    list_display = ["name", "about"]
    prepopulated_fields = {"slug": ["name"]}


@admin.register(Tag)
class TagAdmin(admin.ModelAdmin):
    list_display = ["name", "slug"]
    search_fields = ["name"]
    prepopulated_fields = {"slug": ["name"]}
    exclude = ["blogs"]


@admin.register(Comment)
class CommentAdmin(admin.ModelAdmin):
    list_display = ["name", "text", "blog", "created"]
    list_select_related = ["blog"]
    date_hierarchy = "created"
    search_fields = ["name", "text"]
    raw_id_fields = ["blog"]
