"""A page that follows channels, for a browser: the URLconf of test_comet_browser.py."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.middleware.csrf import get_token
from django.urls import path

from tests.comet_urls import urlpatterns as comet_urlpatterns
from tornjango.templatetags.comet import script

#: ``begin`` follows; what comes is in ``seen``, by channel, and beside it.
PAGE = """<!doctype html><title>Page</title><link rel="icon" href="data:,">%s
<script>
seen = {}
gaps = []
refused = []
statuses = []
reported = []
addEventListener("error", event => { reported.push(event.message); event.preventDefault() })
addEventListener("pageshow", event => { window.persisted = event.persisted })
function begin(channels, options, url = "/comet/") {
    comet = new Comet(url, options)
    comet.onstatus = status => statuses.push(status)
    for (const channel of channels) {
        seen[channel] = []
        comet.on(channel, data => seen[channel].push(data), {
            gap: name => gaps.push(name),
            refused: (error, name) => refused.push([name, error.status]),
        })
    }
}
</script>
%s"""
MODULE = """<script type="module">
import {Comet} from "/static/tornjango/comet.js"
window.Comet = Comet
</script>"""
CLASSIC = '<script src="/static/tornjango/comet.classic.js"></script>'


def page(request: HttpRequest) -> HttpResponse:
    channels = request.GET.getlist("channel")
    get_token(request)
    tag = script(request, *channels) if channels else ""
    return HttpResponse(PAGE % (tag, CLASSIC if "classic" in request.GET else MODULE))


urlpatterns = [*comet_urlpatterns, path("page/", page)]
