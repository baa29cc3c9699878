"""A page consists of panels. Each can be fetched alone (``?panel=name``) and fails alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import render
from django.template.loader import render_to_string
from django.utils.safestring import SafeString

from apps.console.request import person
from apps.notifications.models import Feed
from apps.notifications.services import topics_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Panel:
    """One box of a page.

    Attributes:
        build: returns its data; called only when the panel is shown.
        events: event types, or their first words, after which the page fetches it again.
        every: seconds between fetches without an event; 0 means never.
        fold: only its title is shown until a person opens it.
    """

    name: str
    title: str
    template: str
    build: Callable[[], dict[str, Any]]
    events: tuple[str, ...] = ()
    every: int = 0
    fold: bool = False


def render_page(
    request: HttpRequest,
    template: str,
    *,
    title: str,
    panels: Sequence[Panel],
    topics: Sequence[str] = (),
    whole: Callable[[], dict[str, Any]] = dict,
    **context: Any,
) -> HttpResponse:
    """The whole page, or the one panel that was asked for.

    The page and its panels get ``context``; only the whole page gets what ``whole`` returns.
    """
    context["page_title"] = title
    wanted = request.GET.get("panel")
    if wanted is not None:
        panel = next((panel for panel in panels if panel.name == wanted), None)
        if panel is None:
            raise Http404("there is no such panel")
        return HttpResponse(_render_panel(request, panel, context))
    # Read before the data, so that the page replays the events that happen in between.
    since = last_seqs([*topics_of(person(request)), *topics])
    rendered = {panel.name: _render_panel(request, panel, context) for panel in panels}
    page = {"title": title, "panels": rendered, "since": since, **context, **whole()}
    return render(request, template, page)


def _render_panel(request: HttpRequest, panel: Panel, context: dict[str, Any]) -> SafeString:
    shared = {**context, "panel": panel, "panel_url": _panel_url(request, panel)}
    try:
        return render_to_string(panel.template, {**shared, **panel.build()}, request)
    except Exception:
        log.exception("panel %s could not be built", panel.name)
        return render_to_string("console/panel_failed.html", shared, request)


def _panel_url(request: HttpRequest, panel: Panel) -> str:
    query = request.GET.copy()
    query["panel"] = panel.name
    return f"{request.path}?{query.urlencode()}"


def last_seqs(topics: Sequence[str]) -> dict[str, int]:
    """The newest sequence number of each topic, 0 for a topic without events."""
    known = dict(Feed.objects.filter(topic__in=topics).values_list("topic", "last_seq"))
    return {topic: known.get(topic, 0) for topic in topics}
