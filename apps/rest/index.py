"""Where everything is, for whoever starts with the API's address alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from django.urls import URLPattern, URLResolver, get_resolver
from rest_framework import serializers

PREFIX = "api/v1/"


class IndexOutput(serializers.Serializer[Any]):
    """``collections``: the addresses that can be read without an identifier, by their names."""

    version = serializers.CharField()
    collections = serializers.DictField(child=serializers.CharField())
    schema = serializers.CharField()
    docs = serializers.CharField()
    problems = serializers.CharField()


@cache
def readable_paths() -> tuple[str, ...]:
    """The paths of the API without a variable part that have a GET."""
    return tuple(sorted(_paths(get_resolver().url_patterns, "")))


def _paths(patterns: list[Any], before: str) -> Iterator[str]:
    for pattern in patterns:
        path = before + str(pattern.pattern)
        if isinstance(pattern, URLResolver) and (path.startswith(PREFIX) or path == ""):
            yield from _paths(pattern.url_patterns, path)
        elif isinstance(pattern, URLPattern) and path.startswith(PREFIX) and path != PREFIX:
            view = getattr(pattern.callback, "cls", None)
            if hasattr(view, "get") and "<" not in path and "^" not in path:
                yield path.removeprefix(PREFIX)
