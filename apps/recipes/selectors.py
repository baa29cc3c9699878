"""Recipes and launches as people see them."""

from __future__ import annotations

from dataclasses import dataclass

from django.db.models import QuerySet

from apps.recipes.models import Launch, LogChunk, Recipe

LOG_PAGE_BYTES = 64 * 1024


def recipes() -> QuerySet[Recipe]:
    """The recipes in the folders of all hosts, usable or not."""
    return Recipe.objects.filter(present=True)


def launches() -> QuerySet[Launch]:
    return Launch.objects.select_related("recipe", "requested_by", "project")


@dataclass(frozen=True, slots=True)
class LogPage:
    """Lines from ``start`` to ``end``; earlier lines than ``start`` may have been removed."""

    start: int
    end: int
    text: str
    more: bool = False


def log_page(launch: Launch, *, after: int, limit: int = LOG_PAGE_BYTES) -> LogPage:
    """Whole chunks from the byte ``after`` on, at least one where there is one."""
    start: int | None = None
    end, texts = after, list[str]()
    for chunk in LogChunk.objects.filter(launch=launch, offset__gte=after).iterator():
        if texts and chunk.offset + chunk.length - after > limit:
            return LogPage(start or 0, end, "".join(texts), more=True)
        start = chunk.offset if start is None else start
        end = chunk.offset + chunk.length
        texts.append(chunk.text)
    return LogPage(after if start is None else start, end, "".join(texts))
