"""``?fields=uid,state``: the named members only, for scripts that read often."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rest_framework.request import Request

from apps.rest.problems import Problem

FIELDS = "fields"
MAX_LENGTH = 400
PATTERN = "[a-z0-9_]+(,[a-z0-9_]+)*"
_NAMES = re.compile(PATTERN)


def named_fields(request: Request) -> list[str]:
    """The names that the caller gave, none for whole objects; raises ``Problem`` 400."""
    text = request.query_params.get(FIELDS)
    if text is None:
        return []
    if len(text) > MAX_LENGTH or not _NAMES.fullmatch(text):
        raise Problem(400, "invalid", "fields must be names with commas, such as uid,state.")
    return text.split(",")


def sparse(request: Request, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the members that the caller has named, or whole.

    Raises:
        Problem: 400, a row has no such member.
    """
    names = named_fields(request)
    if not names or not rows:
        return list(rows)
    unknown = [name for name in names if name not in rows[0]]
    if unknown:
        known = ", ".join(sorted(rows[0]))
        raise Problem(400, "invalid", f"There is no field {unknown[0]!r}; known here: {known}.")
    return [{name: row[name] for name in names} for row in rows]
