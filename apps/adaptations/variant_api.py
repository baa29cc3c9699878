"""Variants of blueprints: for people, and for Tamiyo, which suggests them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from django.http import HttpResponseBase
from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.act_endpoint import act_endpoint
from apps.accounts.actors import ActorKind
from apps.accounts.authentication import actor
from apps.accounts.endpoint import Endpoint
from apps.adaptations import services
from apps.adaptations.variant_serializers import VariantOutput
from apps.blueprints.models import Blueprint, Variant
from apps.rest.etag import given_version, versioned_response
from apps.rest.fields import message
from apps.rest.filters import Lookup, apply_filters, one_of, text
from apps.rest.idempotency import idempotent
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import Problem, not_found
from apps.rest.schema import documented, listing, page_of
from esper.contracts import TokenScope, VariantState, protocol, wire

FILTERS: dict[str, Lookup] = {
    "blueprint": ("blueprint__slug", text),
    "state": ("state", one_of(VariantState)),
}


class Variants(Endpoint):
    parameters = PARAMETERS | frozenset(FILTERS)

    @documented("list_variants", answer=page_of(VariantOutput), parameters=listing(FILTERS))
    def get(self, request: Request) -> HttpResponseBase:
        rows = Variant.objects.select_related("blueprint", "decided_by")
        rows = apply_filters(request, rows, FILTERS)
        return page_response(request, rows, lambda rows: VariantOutput(rows, many=True).data)


class SuggestVariant(Endpoint):
    writers: ClassVar = frozenset({TokenScope.DECIDE})

    @documented(
        "suggest_variant",
        body=protocol.VariantSuggestion,
        answer=VariantOutput,
        status=201,
        act=True,
    )
    @idempotent
    def post(self, request: Request, slug: str) -> Response:
        made = services.suggest_variant(
            blueprint=_blueprint(slug),
            told=message(request, protocol.VariantSuggestion),
            actor=actor(request, ActorKind.TAMIYO),
        )
        return Response(VariantOutput(made).data, status=201)


class TriedSizes(Endpoint):
    @documented("read_tried_sizes", answer=protocol.TriedSizes)
    def get(self, request: Request, slug: str) -> Response:
        return Response(wire.to_wire(services.tried_sizes(_blueprint(slug))))


class VariantDetail(Endpoint):
    @documented("read_variant", answer=VariantOutput)
    def get(self, request: Request, uid: str) -> Response:
        return _answer(_variant(uid))


def _act(name: str, service: Callable[..., Any]) -> type[Endpoint]:
    return act_endpoint(
        name,
        service,
        subject="variant",
        find=_as_seen,
        answer=lambda _, variant: _answer(variant),
        output=VariantOutput,
    )


def _as_seen(request: Request, uid: str) -> Variant:
    """The variant, if it has not changed since the caller read it."""
    found = _variant(uid)
    if given_version(request) not in {None, found.revision}:
        raise Problem(412, "version-changed", "Somebody has decided on it since you looked.")
    return found


AdmitVariant = _act("admit_variant", services.admit_variant)
WithdrawVariant = _act("withdraw_variant", services.withdraw_variant)


def _blueprint(slug: str) -> Blueprint:
    found = Blueprint.objects.filter(slug=slug).first()
    if found is None:
        raise not_found("blueprint")
    return found


def _variant(uid: str) -> Variant:
    found = Variant.objects.filter(uid=uid).select_related("blueprint", "decided_by").first()
    if found is None:
        raise not_found("variant")
    return found


def _answer(variant: Variant) -> Response:
    return versioned_response(VariantOutput(variant).data, variant.revision)
