from __future__ import annotations

from functools import partial

from django.http import HttpResponseBase
from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.act_endpoint import act_endpoint
from apps.accounts.endpoint import Endpoint
from apps.blueprints.models import Blueprint, KnownRemedy
from apps.blueprints.serializers import BlueprintOutput, KnownRemedyOutput
from apps.blueprints.services import switch_blueprint
from apps.rest.etag import cacheable_response, given_version, versioned_response
from apps.rest.filters import Lookup, apply_filters, flag, one_of, searching
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import Problem, not_found
from apps.rest.schema import documented, listing, page_of, results_of
from esper.contracts import AdaptationType, BlueprintCategory, Risk

FILTERS: dict[str, Lookup] = {
    "category": ("category", one_of(BlueprintCategory)),
    "adaptation_type": ("adaptation_type", one_of(AdaptationType)),
    "risk": ("risk", one_of(Risk)),
    "enabled": ("enabled", flag),
    "present": ("present", flag),
    "q": searching("slug", "title", "idea", "ident"),
}
ORDER = ("slug", "title")


class Blueprints(Endpoint):
    parameters = PARAMETERS | frozenset(FILTERS)

    @documented(
        "list_blueprints",
        answer=page_of(BlueprintOutput),
        parameters=listing(FILTERS, ORDER),
    )
    def get(self, request: Request) -> HttpResponseBase:
        blueprints = apply_filters(request, Blueprint.objects.all(), FILTERS)
        return page_response(
            request, blueprints, lambda rows: BlueprintOutput(rows, many=True).data, order=ORDER
        )


class KnownRemedies(Endpoint):
    @documented("list_remedies", answer=results_of(KnownRemedyOutput))
    def get(self, request: Request) -> Response:
        rows = KnownRemedy.objects.filter(present=True)
        return Response({"results": KnownRemedyOutput(rows, many=True).data})


class KnownRemedyDetail(Endpoint):
    @documented("read_remedy", answer=KnownRemedyOutput)
    def get(self, request: Request, slug: str) -> Response:
        found = KnownRemedy.objects.filter(slug=slug, present=True).first()
        if found is None:
            raise not_found("remedy")
        return cacheable_response(request, KnownRemedyOutput(found).data)


class BlueprintDetail(Endpoint):
    @documented("read_blueprint", answer=BlueprintOutput)
    def get(self, request: Request, slug: str) -> Response:
        return _answer(_blueprint(slug))


def _act(name: str, *, enabled: bool) -> type[Endpoint]:
    return act_endpoint(
        name,
        partial(switch_blueprint, enabled=enabled),
        subject="blueprint",
        find=_as_seen,
        answer=lambda _, blueprint: _answer(blueprint),
        output=BlueprintOutput,
    )


def _as_seen(request: Request, slug: str) -> Blueprint:
    """The blueprint, if it has not changed since the caller read it."""
    blueprint = _blueprint(slug)
    if given_version(request) not in {None, blueprint.revision}:
        raise Problem(
            412, "version-changed", f"{slug} was switched on or off since you looked at it."
        )
    return blueprint


EnableBlueprint = _act("enable_blueprint", enabled=True)
DisableBlueprint = _act("disable_blueprint", enabled=False)


def _blueprint(slug: str) -> Blueprint:
    blueprint = Blueprint.objects.filter(slug=slug).first()
    if blueprint is None:
        raise not_found("blueprint")
    return blueprint


def _answer(blueprint: Blueprint) -> Response:
    return versioned_response(BlueprintOutput(blueprint).data, blueprint.revision)
