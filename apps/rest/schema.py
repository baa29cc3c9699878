"""The API's conventions in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from drf_spectacular.extensions import OpenApiSerializerExtension
from drf_spectacular.openapi import AutoSchema
from drf_spectacular.plumbing import ResolvedComponent
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import (
    Direction,
    OpenApiParameter,
    OpenApiResponse,
    extend_schema,
    inline_serializer,
)
from rest_framework import serializers

from apps.rest.fields import Members
from esper.contracts import wire

_COMPONENTS = "#/components/schemas/"
_F = TypeVar("_F", bound=Callable[..., Any])

IDEMPOTENCY_KEY = OpenApiParameter(
    "Idempotency-Key",
    str,
    OpenApiParameter.HEADER,
    required=True,
    description="New for each act; the same when the act is repeated.",
)
IF_MATCH = OpenApiParameter(
    "If-Match",
    str,
    OpenApiParameter.HEADER,
    required=True,
    description="The ETag of the version that you have read.",
)
CURSOR = OpenApiParameter("cursor", str, description="From `next` or `previous` of a page.")
LIMIT = OpenApiParameter("limit", int, description="Rows per page, 1…200.")


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
) -> Callable[[_F], _F]:
    """Describe one handler: its name in clients, its input and its answer.

    Args:
        act: it needs an idempotency key.
        versioned: it needs ``If-Match`` too.
    """
    headers = ([IDEMPOTENCY_KEY] if act else []) + ([IF_MATCH] if versioned else [])
    return extend_schema(
        operation_id=name,
        request=body,
        responses={status: answer, "default": _PROBLEM},
        parameters=[*(parameters or []), *headers],
        summary=summary or name.replace("_", " ").capitalize(),
        description=" ",  # otherwise the docstrings of the views, which are for developers
    )


def query(name: str, kind: Any = str, description: str = "") -> OpenApiParameter:
    return OpenApiParameter(name, kind, OpenApiParameter.QUERY, description=description)


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


ANY_OBJECT = OpenApiTypes.OBJECT


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
        for name, text in wire.meanings(self.target).items():
            member = schema["properties"].get(name, {"$ref": ""})
            if "$ref" not in member:  # whose description stands with what it refers to
                member["description"] = text
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
