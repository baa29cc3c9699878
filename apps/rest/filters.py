"""Query parameters. A parameter that is not in the list of known ones is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC
from typing import Any, TypeVar

from django.db.models import Model, Q, QuerySet
from django.utils.dateparse import parse_datetime
from rest_framework.request import Request

from apps.rest.problems import Problem


@dataclass(frozen=True, slots=True)
class Parse:
    """The parser of a parameter's value, and how the OpenAPI document describes such values."""

    parse: Callable[[str], Any]
    schema: Mapping[str, Any]

    def __call__(self, value: str) -> Any:
        return self.parse(value)


def described(**schema: Any) -> Callable[[Callable[[str], Any]], Parse]:
    """Decorates a parser with the schema of what it accepts."""
    return lambda parse: Parse(parse, schema)


# A field with its look-up, or a condition made from the value; and the parser of the value.
Lookup = tuple[str | Callable[[Any], Q], Parse]
_M = TypeVar("_M", bound=Model)


@described(type="string", maxLength=300)
def text(value: str) -> str:
    if len(value) > 300 or "\x00" in value:
        raise ValueError("a text of at most 300 characters")
    return value


def one_of(members: Iterable[str]) -> Parse:
    known = [str(member) for member in members]

    @described(type="string", enum=known)
    def parse(value: str) -> str:
        if value not in known:
            raise ValueError(f"one of {', '.join(known)}")
        return value

    return parse


def many_of(members: Iterable[str]) -> Parse:
    member = one_of(members)

    @described(type="array", items=member.schema, minItems=1)
    def parse(value: str) -> list[str]:
        return [member(part) for part in value.split(",")]

    return parse


@described(type="integer", minimum=-(10**17), maximum=10**18 - 1)
def whole_number(value: str) -> int:
    if not (value.isascii() and value.removeprefix("-").isdigit() and len(value) <= 18):
        raise ValueError("a whole number")
    return int(value)


@described(type="number", minimum=-1e300, maximum=1e300)
def number(value: str) -> float:
    try:
        found = float(value) if value.isascii() and len(value) <= 40 else math.nan
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ValueError("a number")
    return found


@described(type="boolean")
def flag(value: str) -> bool:
    if value not in {"true", "false"}:
        raise ValueError("true or false")
    return value == "true"


@described(type="string", format="date-time")
def moment(value: str) -> Any:
    parsed = parse_datetime(value)
    if parsed is None or parsed.tzinfo is None:
        raise ValueError("a time such as 2026-01-31T12:00:00Z")
    try:
        return parsed.astimezone(UTC)
    except OverflowError as error:  # within the calendar at its offset, beyond it in UTC
        raise ValueError("a time between the years 1 and 9999 in UTC") from error


def apply_filters(
    request: Request, rows: QuerySet[_M], known: Mapping[str, Lookup]
) -> QuerySet[_M]:
    """Narrow ``rows`` by the request's parameters."""
    values = {
        name: parse_parameter(request, name, parse)
        for name, (_, parse) in known.items()
        if name in request.query_params
    }
    return narrowed(rows, known, values)


def narrowed(
    rows: QuerySet[_M], known: Mapping[str, Lookup], values: Mapping[str, Any]
) -> QuerySet[_M]:
    """The rows that match every one of ``values``, which are named as in ``known``."""
    for name, value in values.items():
        lookup = known[name][0]
        rows = rows.filter(lookup(value) if callable(lookup) else Q(**{lookup: value}))
    return rows


def searching(*columns: str) -> Lookup:
    """``q=``: the rows in which one of these columns holds a text, in any case."""

    def condition(value: str) -> Q:
        found = Q()
        for column in columns:
            found |= Q(**{f"{column}__icontains": value})
        return found

    return condition, text


def between(parse: Parse, *columns: str) -> dict[str, Lookup]:
    """``column__gte=`` and ``column__lt=`` of each column."""
    ways = [f"{column}__{way}" for column in columns for way in ("gte", "lt")]
    return {way: (way, parse) for way in ways}


def of_run(value: str) -> Q:
    """Rows of a run, by its uid or its name."""
    return Q(run__uid=value) | Q(run__name=value)


def parse_parameter(request: Request, name: str, parse: Parse, default: Any = None) -> Any:
    """One parameter's value; raises ``Problem`` 400 that says what it should be."""
    value = request.query_params.get(name)
    if value is None:
        return default
    try:
        return parse(value)
    except ValueError as error:
        raise Problem(
            400,
            "invalid",
            f"{name} must be {error}.",
            errors=[{"parameter": name, "code": "invalid", "detail": f"must be {error}"}],
        ) from error


def refuse_unknown_parameters(request: Request, known: frozenset[str]) -> None:
    """Raises ``Problem`` 400 for a query parameter that is not known, instead of ignoring it."""
    unknown = sorted(set(request.query_params) - known)
    if unknown:
        errors = [
            {
                "parameter": name,
                "code": "unknown-parameter",
                "detail": "There is no such parameter.",
            }
            for name in unknown
        ]
        allowed = ", ".join(sorted(known)) or "none"
        raise Problem(
            400,
            "invalid",
            f"Unknown parameter {unknown[0]!r}; known here: {allowed}.",
            errors=errors,
        )
