"""Pages by key: cheap at any depth, and stable while rows are added."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlencode

from django.db.models import Model, QuerySet
from rest_framework.request import Request
from rest_framework.response import Response

from apps.rest.etag import cacheable_response
from apps.rest.problems import Problem

DEFAULT_LIMIT = 50
MAX_LIMIT = 200
PARAMETERS = frozenset({"cursor", "limit"})
_M = TypeVar("_M", bound=Model)


def page_response(
    request: Request, rows: QuerySet[_M], shape: Callable[[list[_M]], Any]
) -> Response:
    """One page of ``rows``, newest first: ``{"results", "next", "previous"}`` and ``Link``.

    A caller that sends the page's ``ETag`` gets 304 while nothing of it has changed.
    """
    limit = _limit(request)
    older, key = _cursor(request)
    if older:
        found = list(_below(rows, key).order_by("-pk")[: limit + 1])
        items, more = found[:limit], len(found) > limit
        has_next, has_previous = more, key is not None and bool(items)
    else:
        found = list(rows.filter(pk__gt=key).order_by("pk")[: limit + 1])
        items, more = found[:limit][::-1], len(found) > limit
        has_next, has_previous = bool(items), more
    following = _link(request, "o", items[-1].pk) if has_next else None
    preceding = _link(request, "n", items[0].pk) if has_previous else None
    data = {"results": shape(items), "next": following, "previous": preceding}
    answer = cacheable_response(request, data)
    links = {"next": following, "prev": preceding}
    header = ", ".join(f'<{url}>; rel="{rel}"' for rel, url in links.items() if url)
    if header:
        answer.headers["Link"] = header
    return answer


def _below(rows: QuerySet[_M], key: int | None) -> QuerySet[_M]:
    return rows if key is None else rows.filter(pk__lt=key)


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", str(DEFAULT_LIMIT))
    digits = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_LIMIT))
    if not (digits and 1 <= int(text) <= MAX_LIMIT):
        raise Problem(400, "invalid", f"limit must be a whole number in 1…{MAX_LIMIT}.")
    return int(text)


def _cursor(request: Request) -> tuple[bool, int | None]:
    """(towards older rows?, key to start from)."""
    text = request.query_params.get("cursor")
    if not text:
        return True, None
    try:
        raw = base64.urlsafe_b64decode(text.encode("ascii")).decode("ascii")
        direction, number = raw[:1], raw[1:]
        if direction not in {"o", "n"} or not number.isdigit() or len(number) > 18:
            raise ValueError(raw)
    except (binascii.Error, ValueError) as error:
        raise Problem(
            400, "invalid", "cursor is not valid: take it from `next` or `previous` of a page."
        ) from error
    return direction == "o", int(number)


def _link(request: Request, direction: str, key: int) -> str:
    cursor = base64.urlsafe_b64encode(f"{direction}{key}".encode("ascii")).decode("ascii")
    query = {**request.query_params.dict(), "cursor": cursor}
    return request.build_absolute_uri(f"{request.path}?{urlencode(query)}")
