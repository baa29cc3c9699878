"""Pages by key: cheap at any depth, and stable while rows are added. And whole lists, streamed."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import urlencode

from django.core.exceptions import ValidationError
from django.db.models import Field, Model, Q, QuerySet
from django.http import HttpResponseBase
from rest_framework.request import Request

from apps.rest.etag import cacheable_response
from apps.rest.exports import FORMAT, export_response, wants_export
from apps.rest.problems import Problem
from esper.contracts import codec
from esper.exceptions import CodecError

DEFAULT_LIMIT = 50
MAX_LIMIT = 200
MAX_CURSOR = 400
ORDER_BY = "order_by"
PARAMETERS = frozenset({"cursor", "limit", FORMAT, ORDER_BY})
_M = TypeVar("_M", bound=Model)


@dataclass(frozen=True, slots=True)
class _Order:
    """By a column that is never null, then by the key, both in one direction."""

    column: str = "pk"
    descending: bool = True

    def keys(self, *, reverse: bool) -> list[str]:
        sign = "-" if self.descending is not reverse else ""
        return [f"{sign}{self.column}", *([f"{sign}pk"] if self.column != "pk" else [])]

    def beyond(self, place: tuple[Any, int], *, reverse: bool) -> Q:
        """The rows after ``place`` in this order, before it in reverse."""
        word = "lt" if self.descending is not reverse else "gt"
        value, key = place
        if self.column == "pk":
            return Q(**{f"pk__{word}": key})
        after = Q(**{f"{self.column}__{word}": value})
        return after | Q(**{self.column: value, f"pk__{word}": key})

    def place(self, row: Model) -> tuple[Any, int]:
        return getattr(row, self.column), row.pk


def page_response(
    request: Request,
    rows: QuerySet[_M],
    shape: Callable[[list[_M]], Any],
    *,
    order: Sequence[str] = (),
) -> HttpResponseBase:
    """One page of ``rows``, newest first: ``{"results", "next", "previous"}`` and ``Link``.

    A caller that sends the page's ``ETag`` gets 304 while nothing of it has changed. One that
    accepts CSV or NDJSON gets all rows instead, streamed.

    Args:
        order: columns that are never null, which ``order_by`` may name.
    """
    ordered = _order(request, order)
    limit = _limit(request)
    reverse, place = _cursor(request, rows.model, ordered)
    if wants_export(request):
        chunks = _chunks(rows.order_by(*ordered.keys(reverse=False)), shape)
        return export_response(request, chunks)
    if place is not None:
        rows = rows.filter(ordered.beyond(place, reverse=reverse))
    found = list(rows.order_by(*ordered.keys(reverse=reverse))[: limit + 1])
    items, more = found[:limit], len(found) > limit
    if reverse:
        items = items[::-1]
    has_next = bool(items) if reverse else more
    has_previous = more if reverse else place is not None and bool(items)
    following = _link(request, "o", ordered.place(items[-1])) if has_next else None
    preceding = _link(request, "n", ordered.place(items[0])) if has_previous else None
    data = {"results": shape(items), "next": following, "previous": preceding}
    answer = cacheable_response(request, data)
    links = {"next": following, "prev": preceding}
    header = ", ".join(f'<{url}>; rel="{rel}"' for rel, url in links.items() if url)
    if header:
        answer.headers["Link"] = header
    return answer


def _chunks(rows: QuerySet[_M], shape: Callable[[list[_M]], Any]) -> Iterator[list[dict[str, Any]]]:
    """All rows, a page at a time, so that no list is held in memory."""
    waiting: list[_M] = []
    for row in rows.iterator(chunk_size=MAX_LIMIT):
        waiting.append(row)
        if len(waiting) == MAX_LIMIT:
            yield shape(waiting)
            waiting = []
    if waiting:
        yield shape(waiting)


def _order(request: Request, columns: Sequence[str]) -> _Order:
    text = request.query_params.get(ORDER_BY)
    if not text:
        return _Order()
    name = text.removeprefix("-")
    if name != "id" and name not in columns:
        known = ", ".join(sorted({"id", *columns}))
        raise Problem(400, "invalid", f"order_by must be one of {known}, with - for descending.")
    return _Order("pk" if name == "id" else name, descending=text.startswith("-"))


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", str(DEFAULT_LIMIT))
    digits = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_LIMIT))
    if not (digits and 1 <= int(text) <= MAX_LIMIT):
        raise Problem(400, "invalid", f"limit must be a whole number in 1…{MAX_LIMIT}.")
    return int(text)


def _cursor(
    request: Request, model: type[Model], order: _Order
) -> tuple[bool, tuple[Any, int] | None]:
    """(towards earlier rows?, place to start from)."""
    text = request.query_params.get("cursor")
    if not text:
        return False, None
    try:
        raw = base64.urlsafe_b64decode(text.encode("ascii"))
        direction, value, key = codec.decode(raw, max_bytes=MAX_CURSOR)
        if direction not in {"o", "n"} or type(key) is not int or not 0 <= key < 10**18:
            raise ValueError(raw)
        field = model._meta.pk if order.column == "pk" else model._meta.get_field(order.column)
        assert isinstance(field, Field)
        return direction == "n", (field.to_python(value), key)
    except (binascii.Error, CodecError, TypeError, ValueError, ValidationError) as error:
        raise Problem(
            400,
            "invalid",
            "cursor is not valid: take it from `next` or `previous` of a page in the same order.",
        ) from error


def _link(request: Request, direction: str, place: tuple[Any, int]) -> str:
    value, key = place
    wire = value.isoformat() if isinstance(value, datetime) else value
    cursor = base64.urlsafe_b64encode(codec.encode([direction, wire, key])).decode("ascii")
    query = {**request.query_params.dict(), "cursor": cursor}
    return request.build_absolute_uri(f"{request.path}?{urlencode(query)}")
