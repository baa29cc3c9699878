from __future__ import annotations

from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.authentication import person, via
from apps.accounts.endpoint import Endpoint
from apps.blueprints.models import Blueprint
from apps.blueprints.serializers import BlueprintOutput
from apps.blueprints.services import switch_blueprint
from apps.rest.etag import given_version, versioned_response
from apps.rest.fields import ReasonInput, parse
from apps.rest.filters import apply_filters, flag, one_of
from apps.rest.idempotency import idempotent
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import Problem, not_found
from apps.rest.schema import CURSOR, LIMIT, documented, page_of, query
from apps.rest.throttling import ActThrottle
from esper.contracts import AdaptationType, BlueprintCategory, Risk

FILTERS = {
    "category": ("category", one_of(BlueprintCategory)),
    "adaptation_type": ("adaptation_type", one_of(AdaptationType)),
    "risk": ("risk", one_of(Risk)),
    "enabled": ("enabled", flag),
    "present": ("present", flag),
}


class Blueprints(Endpoint):
    parameters = PARAMETERS | frozenset(FILTERS)

    @documented(
        "list_blueprints",
        answer=page_of(BlueprintOutput),
        parameters=[*(query(name) for name in FILTERS), CURSOR, LIMIT],
    )
    def get(self, request: Request) -> Response:
        blueprints = apply_filters(request, Blueprint.objects.all(), FILTERS)
        return page_response(
            request, blueprints, lambda rows: BlueprintOutput(rows, many=True).data
        )


class BlueprintDetail(Endpoint):
    @documented("read_blueprint", answer=BlueprintOutput)
    def get(self, request: Request, slug: str) -> Response:
        return _answer(_blueprint(slug))


class EnableBlueprint(Endpoint):
    throttle_classes = (ActThrottle,)

    @documented("enable_blueprint", body=ReasonInput, answer=BlueprintOutput, act=True)
    @idempotent
    def post(self, request: Request, slug: str) -> Response:
        return _switch(request, slug, enabled=True)


class DisableBlueprint(Endpoint):
    throttle_classes = (ActThrottle,)

    @documented("disable_blueprint", body=ReasonInput, answer=BlueprintOutput, act=True)
    @idempotent
    def post(self, request: Request, slug: str) -> Response:
        return _switch(request, slug, enabled=False)


def _switch(request: Request, slug: str, *, enabled: bool) -> Response:
    blueprint = _blueprint(slug)
    if given_version(request) not in {None, blueprint.revision}:
        raise Problem(412, "version-changed", "Somebody has switched it since you looked.")
    switched = switch_blueprint(
        blueprint=blueprint,
        enabled=enabled,
        user=person(request),
        via=via(request),
        reason=parse(ReasonInput, request.data)["reason"],
    )
    return _answer(switched)


def _blueprint(slug: str) -> Blueprint:
    blueprint = Blueprint.objects.filter(slug=slug).first()
    if blueprint is None:
        raise not_found("blueprint")
    return blueprint


def _answer(blueprint: Blueprint) -> Response:
    return versioned_response(BlueprintOutput(blueprint).data, blueprint.revision)
