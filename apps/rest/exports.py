"""Whole lists as CSV or NDJSON: the same address and filters, with ``Accept`` or ``?format=``."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from contextvars import copy_context
from itertools import chain
from typing import Any, TypeVar

from django.http import StreamingHttpResponse
from rest_framework.request import Request

from apps.rest.codec import StrictJSONRenderer
from apps.rest.sparse import sparse
from esper.contracts import codec

_T = TypeVar("_T")

FORMAT = "format"
# A spreadsheet would run what begins with one of these; some take their wide forms, too.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


class CSVRenderer(StrictJSONRenderer):
    """Chosen by ``text/csv``; it renders problems only, because lists are streamed."""

    media_type = "text/csv"
    format = "csv"


class NDJSONRenderer(StrictJSONRenderer):
    """Chosen by ``application/x-ndjson``; it renders problems only, because lists are streamed."""

    media_type = "application/x-ndjson"
    format = "ndjson"


EXPORTS = (CSVRenderer, NDJSONRenderer)


def wants_export(request: Request) -> bool:
    """Whether the caller has asked for a whole list."""
    return isinstance(request.accepted_renderer, EXPORTS)


def export_response(
    request: Request, chunks: Iterable[list[dict[str, Any]]]
) -> StreamingHttpResponse:
    """All rows, as they are read from the database.

    Raises:
        Problem: 400, a row has no member that the request names.
    """
    renderer = request.accepted_renderer
    shaped = iter(sparse(request, chunk) for chunk in chunks)
    first = next(shaped, [])  # now: a refusal in the midst of a stream would only end it
    rows = (row for chunk in chain([first], shaped) for row in chunk)
    lines = _csv(rows) if renderer.format == CSVRenderer.format else _ndjson(rows)
    name = request.path.rstrip("/").rsplit("/", 1)[-1]
    return StreamingHttpResponse(
        as_of_now(lines),
        content_type=f"{renderer.media_type}; charset=utf-8",
        headers={
            "Content-Disposition": f'attachment; filename="esper-{name}.{renderer.format}"',
            "Cache-Control": "private, no-store",
        },
    )


def as_of_now(items: Iterable[_T]) -> Iterator[_T]:
    """Make each item as if it were made now: with what the present request may see.

    A body is streamed after the request has ended, and a query in it would see every project.
    """
    context, each = copy_context(), iter(items)
    end = object()

    def stream() -> Iterator[_T]:
        while (item := context.run(next, each, end)) is not end:
            yield item  # type: ignore[misc]

    return stream()


def _ndjson(rows: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    for row in rows:
        yield codec.encode(row) + b"\n"


class _Line:
    """A file for ``csv.writer`` that returns what was written."""

    def write(self, text: str) -> str:
        return text


def _csv(rows: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    writer = csv.writer(_Line())
    columns: list[str] = []
    for row in rows:
        if not columns:
            columns = list(row)
            yield writer.writerow(columns).encode()
        yield writer.writerow([_cell(row.get(name)) for name in columns]).encode()


def _cell(value: Any) -> str | int | float:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return f"'{text}" if text.startswith(_FORMULA) else text
