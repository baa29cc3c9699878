"""The API's conventions in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from drf_spectacular.extensions import OpenApiSerializerExtension
from drf_spectacular.openapi import AutoSchema
from drf_spectacular.plumbing import ResolvedComponent
from drf_spectacular.utils import (
    Direction,
    OpenApiParameter,
    OpenApiResponse,
    extend_schema,
    inline_serializer,
)
from rest_framework import serializers

from apps.rest.etag import VERSION_PATTERN
from apps.rest.exports import FORMAT
from apps.rest.fields import Members
from apps.rest.filters import Lookup, Parse, text
from apps.rest.idempotency import DRY_RUN, MAX_KEY_LENGTH
from apps.rest.pagination import DEFAULT_LIMIT, MAX_LIMIT
from esper.contracts import wire

PROBLEM_TYPE = "application/problem+json"
_COMPONENTS = "#/components/schemas/"
_F = TypeVar("_F", bound=Callable[..., Any])

IDEMPOTENCY_KEY = OpenApiParameter(
    "Idempotency-Key",
    location=OpenApiParameter.HEADER,
    required=True,
    type={"type": "string", "minLength": 1, "maxLength": MAX_KEY_LENGTH},
    description="New for each act; the same when the act is repeated.",
)
IF_MATCH = OpenApiParameter(
    "If-Match",
    location=OpenApiParameter.HEADER,
    required=True,
    type={"type": "string", "pattern": f"^{VERSION_PATTERN}$"},
    description="The ETag of the version that you have read.",
)
DRY_RUN_PARAMETER = OpenApiParameter(
    DRY_RUN,
    {"type": "boolean", "default": False},
    description="Check everything and answer what would be; change nothing.",
)
CURSOR = OpenApiParameter(
    "cursor",
    {"type": "string", "pattern": "^[A-Za-z0-9_=-]{0,400}$"},
    description="From `next` or `previous` of a page.",
)
FORMAT_PARAMETER = OpenApiParameter(
    FORMAT,
    {"type": "string", "enum": ["json", "csv", "ndjson"], "default": "json"},
    description="csv and ndjson: all rows instead of a page, streamed. `Accept` says the same.",
)
LIMIT = OpenApiParameter(
    "limit",
    {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
    description=f"Rows per page, 1…{MAX_LIMIT}.",
)


class ProblemOutput(serializers.Serializer[Any]):
    """``application/problem+json`` (RFC 9457)."""

    type = serializers.CharField()
    title = serializers.CharField()
    status = serializers.IntegerField()
    detail = serializers.CharField()
    code = serializers.CharField()
    request_id = serializers.CharField()
    # a field; the metaclass takes it away
    errors = serializers.ListField(child=Members())  # type: ignore[assignment]


_PROBLEM = OpenApiResponse(
    ProblemOutput, description="The request was refused: what is wrong, and what to do."
)


def documented(
    name: str,
    *,
    answer: Any,
    body: Any = None,
    status: int = 200,
    parameters: list[OpenApiParameter] | None = None,
    act: bool = False,
    versioned: bool = False,
    summary: str = "",
    media_type: str = "application/json",
) -> Callable[[_F], _F]:
    """Describe one handler: its name in clients, its input and its answer.

    Args:
        act: it needs an idempotency key.
        versioned: it needs ``If-Match`` too.
    """
    headers = ([DRY_RUN_PARAMETER, IDEMPOTENCY_KEY] if act else []) + (
        [IF_MATCH] if versioned else []
    )
    return extend_schema(
        operation_id=name,
        request=body,
        responses={(status, media_type): answer, ("default", PROBLEM_TYPE): _PROBLEM},
        parameters=[*(parameters or []), *headers],
        summary=summary or name.replace("_", " ").capitalize(),
        description=" ",  # otherwise the docstrings of the views, which are for developers
    )


def query(
    name: str, parse: Parse = text, description: str = "", *, required: bool = False
) -> OpenApiParameter:
    """A query parameter with the values that its parser accepts."""
    listed = parse.schema["type"] == "array"
    return OpenApiParameter(
        name,
        dict(parse.schema),
        description=description,
        required=required,
        style="form" if listed else None,
        explode=False if listed else None,
    )


def queries(
    known: Mapping[str, Lookup], meanings: Mapping[str, str] | None = None
) -> list[OpenApiParameter]:
    """The parameters of a list, as its filters read them."""
    described = meanings or {}
    return [query(name, parse, described.get(name, "")) for name, (_, parse) in known.items()]


def ordering(columns: Sequence[str] = ()) -> OpenApiParameter:
    """How a list may be ordered; without it the newest comes first."""
    names = [sign + name for name in sorted({"id", *columns}) for sign in ("", "-")]
    return OpenApiParameter(
        "order_by",
        {"type": "string", "enum": names},
        description="Ascending by this column, with - descending. Default: -id.",
    )


def listing(
    known: Mapping[str, Lookup] | None = None,
    order: Sequence[str] = (),
    meanings: Mapping[str, str] | None = None,
) -> list[OpenApiParameter]:
    """All parameters of a list with these filters."""
    return [*queries(known or {}, meanings), ordering(order), CURSOR, LIMIT, FORMAT_PARAMETER]


def count(name: str, *, most: int, default: int, description: str = "") -> OpenApiParameter:
    """A number of things to return."""
    schema: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": most}
    return OpenApiParameter(name, {**schema, "default": default}, description=description)


def page_of(row: type[serializers.BaseSerializer[Any]]) -> Any:
    """One page of a list."""
    return inline_serializer(
        f"{row.__name__}Page",
        {
            "results": row(many=True),
            "next": serializers.CharField(allow_null=True),
            "previous": serializers.CharField(allow_null=True),
        },
    )


def results_of(row: type[serializers.BaseSerializer[Any]]) -> Any:
    """A short list without pages."""
    return inline_serializer(f"{row.__name__}Results", {"results": row(many=True)})


class PersonsInputSchema(OpenApiSerializerExtension):  # type: ignore[no-untyped-call]
    """People's inputs refuse members that are unknown."""

    target_class = "apps.rest.fields.PersonsInput"
    match_subclasses = True

    def map_serializer(self, auto_schema: AutoSchema, direction: Direction) -> dict[str, Any]:
        schema = auto_schema._map_serializer(  # type: ignore[no-untyped-call]
            self.target, direction, bypass_extensions=True
        )
        return {**schema, "additionalProperties": False}


class MessageSchema(OpenApiSerializerExtension):  # type: ignore[no-untyped-call]
    """The protocol's messages, described by their own types."""

    target_class = "esper.contracts.protocol.Message"
    match_subclasses = True

    def get_name(self, auto_schema: AutoSchema, direction: Direction) -> str:
        return str(self.target.__name__)

    def map_serializer(self, auto_schema: AutoSchema, direction: Direction) -> dict[str, Any]:
        _, components = msgspec.json.schema_components(
            [self.target], schema_hook=wire.schema_of, ref_template=f"{_COMPONENTS}{{name}}"
        )
        schema: dict[str, Any] = components.pop(self.target.__name__)
        schema["description"] = wire.introduction(self.target)
        for name, meaning in wire.meanings(self.target).items():
            member = schema["properties"].get(name, {"$ref": ""})
            if "$ref" not in member:  # whose description stands with what it refers to
                member["description"] = meaning
        for name, part in components.items():
            # drf-spectacular's class has no annotations
            component = ResolvedComponent(  # type: ignore[no-untyped-call]
                name=name, type=ResolvedComponent.SCHEMA, object=name, schema=part
            )
            auto_schema.registry.register_on_missing(component)
        return schema


class AnswerSchema(MessageSchema):  # type: ignore[no-untyped-call]
    target_class = "esper.contracts.protocol.Answer"  # a dataclass, as what it adds to
    match_subclasses = False
