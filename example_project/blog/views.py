from __future__ import annotations

from typing import Any

from django.contrib.postgres.search import SearchQuery
from django.core.paginator import Paginator
from django.db.models import Count, F, QuerySet
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import aget_object_or_404, redirect
from django.template.loader import render_to_string
from django.utils.html import linebreaks
from django.views.decorators.http import require_POST

from tornjango import DeferredResponse, comet, db
from tornjango.forms import is_valid, save
from tornjango.shortcuts import arender

from .forms import CommentForm, SearchForm
from .models import SEARCHED, Author, Blog, Comment, Tag

MOST_IN_FEED = 500

# Compiled once, for all entries: compiling costs more than all the rest of a small query.
by_slug = db.prepare(
    lambda slug: Blog.objects.select_related("author").prefetch_related("tags").filter(slug=slug)
)

# Deferred views take a response, and end it whenever they have what they need. The first is the one of 2009, to the letter.


# fmt: off
def my_async_view(request, response):
    query = Blog.objects.filter(pubdate__year=2009).exclude(tag__slug='sport')
    def done(rows):
        response.render('blog.html', {'rows': rows})
    db.execute_async(query, done)
# fmt: on


def about(request: HttpRequest, response: DeferredResponse) -> None:
    """Querysets in the context are fetched before the template is rendered, side by side."""
    authors = Author.objects.annotate(count=Count("blog")).order_by("name")
    response.render("blog/about.html", {"authors": authors, "years": years()})


def feed(request: HttpRequest, response: DeferredResponse) -> None:
    """https://www.jsonfeed.org/version/1.1/, with as many of the latest entries as ``?entries=`` says."""
    asked = request.GET.get("entries", "")
    entries = min(int(asked), MOST_IN_FEED) if asked.isdecimal() and asked.isascii() else 20

    def done(entries: list[Blog]) -> None:
        response.headers["Content-Type"] = "application/feed+json"
        response.json(
            {
                "version": "https://jsonfeed.org/version/1.1",
                "title": "The Long Poll",
                "home_page_url": request.build_absolute_uri("/"),
                "items": [feed_item(request, entry) for entry in entries],
            }
        )

    db.execute_async(Blog.objects.select_related("author")[:entries], done)


def feed_item(request: HttpRequest, entry: Blog) -> dict[str, Any]:
    url = request.build_absolute_uri(entry.get_absolute_url())
    return {
        "id": url,
        "url": url,
        "title": entry.title,
        "summary": entry.summary,
        "content_html": linebreaks(entry.body, autoescape=True),
        "date_published": entry.pubdate,
        "authors": [{"name": entry.author.name}],
    }


# Async views await what they need: Django's own async methods, which take no thread here, and db's.


async def index(request: HttpRequest) -> HttpResponse:
    return await listing(request, Blog.objects.all())


async def by_year(request: HttpRequest, year: str) -> HttpResponse:
    return await listing(request, Blog.objects.filter(pubdate__year=year), year=int(year))


async def by_tag(request: HttpRequest, slug: str) -> HttpResponse:
    tag = await aget_object_or_404(Tag, slug=slug)
    return await listing(request, Blog.objects.filter(tag=tag), tag=tag)


async def by_author(request: HttpRequest, slug: str) -> HttpResponse:
    author = await aget_object_or_404(Author, slug=slug)
    return await listing(request, Blog.objects.filter(author=author), author=author)


async def search(request: HttpRequest) -> HttpResponse:
    form = SearchForm(request.GET or None)
    entries = Blog.objects.none()
    if form.is_valid():
        query = SearchQuery(form.cleaned_data["q"], config="english", search_type="websearch")
        entries = Blog.objects.alias(searched=SEARCHED).filter(searched=query)
        if year := form.cleaned_data["year"]:
            entries = entries.filter(pubdate__year=year)
    return await listing(request, entries, template="blog/search.html", form=form)


async def entry(request: HttpRequest, slug: str) -> HttpResponse:
    entry = await get_entry(slug)
    user = await request.auser()
    return await entry_page(request, entry, CommentForm(initial={"name": user.get_username()}))


@require_POST
async def comment(request: HttpRequest, slug: str) -> HttpResponse:
    """Answers the page's script with the form, a browser without script with a page or a redirect.

    The comment itself reaches every page that shows the entry, this one included, through the channel.
    """
    entry = await get_entry(slug)
    form = CommentForm(request.POST, instance=Comment(blog=entry))
    from_script = request.headers.get("X-Requested-With") == "fetch"
    if not await is_valid(form):
        if from_script:
            context = {"entry": entry, "form": form}
            return await arender(request, "blog/comment_form.html", context, status=422)
        return await entry_page(request, entry, form, status=422)
    comment = await save(form)
    html = render_to_string("blog/comment.html", {"comment": comment})
    await comet.apublish_batch(
        [
            comet.Event(f"entry:{entry.pk}", {"id": comment.pk, "html": html}),
            comet.Event("count", {"comments": await Comment.objects.acount()}),
        ]
    )
    if from_script:
        blank = CommentForm(initial={"name": comment.name})
        context = {"entry": entry, "form": blank, "posted": True}
        return await arender(request, "blog/comment_form.html", context)
    return redirect(f"{entry.get_absolute_url()}#comment-{comment.pk}")


# Plain views run in a worker thread, and may block on whatever they like.


def anywhere(request: HttpRequest) -> HttpResponse:
    if entry := Blog.objects.order_by("?").first():
        return redirect(entry)
    raise Http404("There are no entries yet.")


# What the views above share.


async def listing(
    request: HttpRequest,
    entries: QuerySet[Blog],
    *,
    template: str = "blog/list.html",
    **context: Any,
) -> HttpResponse:
    """One page of entries, newest first."""
    shown = entries.select_related("author").prefetch_related("tags").order_by("-pubdate")
    paginator = Paginator(shown.annotate(comment_count=Count("comments")), per_page=20)
    paginator.count = await entries.acount()
    page = paginator.get_page(request.GET.get("page"))
    context |= {"page": page, "entries": page.object_list, "years": years(), "tags": tags()}
    context["written"] = await Comment.objects.acount()
    return await arender(request, template, context)


async def entry_page(
    request: HttpRequest, entry: Blog, form: CommentForm, *, status: int = 200
) -> HttpResponse:
    # What the page follows it says itself, by {% comet %}: from before this view's queries on.
    context = {"entry": entry, "comments": entry.comments.all(), "form": form}
    return await arender(request, "blog/entry.html", context, status=status)


async def get_entry(slug: str) -> Blog:
    if entry := await by_slug.first(slug=slug):
        return entry
    raise Http404("There is no such entry.")


def years() -> QuerySet[Any, Any]:
    years = Blog.objects.values(year=F("pubdate__year"))
    return years.annotate(count=Count("pk")).order_by("-year")


def tags() -> QuerySet[Tag]:
    return Tag.objects.annotate(count=Count("blogs")).order_by("name")
