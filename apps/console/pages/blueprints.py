"""The blueprint catalogue, and one blueprint with its uses."""

from __future__ import annotations

from typing import Any

from django.db.models import Avg, Count, Q, QuerySet
from django.http import Http404, HttpRequest, HttpResponse
from django.utils.translation import gettext as _

from apps.accounts.models import User
from apps.accounts.policy import Act, may
from apps.adaptations import services as adaptations
from apps.adaptations.models import Adaptation
from apps.blueprints.models import Blueprint, Variant
from apps.console.language import as_written
from apps.console.panels import Panel, render_page
from apps.console.request import page, person
from apps.console.sentences import in_sentence
from apps.kernels.models import Kernel
from apps.runs.selectors import HUGE_COLUMNS_OF_RUN
from esper.contracts import AdaptationState
from esper.contracts.percent import percent, signed

_BAD_ENDS = (AdaptationState.ROLLED_BACK, AdaptationState.REVERTED, AdaptationState.ROLLBACK_FAILED)


@page
def blueprints(request: HttpRequest) -> HttpResponse:
    panels = [
        Panel(
            "list",
            _("Blueprints"),
            "console/blueprints/list.html",
            lambda: {"rows": list(catalogue())},
            ("blueprint", "adaptation"),
        )
    ]
    return render_page(
        request,
        "console/simple.html",
        title=_("Blueprints"),
        panels=panels,
        intro=_("Templates for modules that Esper can add to a layer of a model."),
    )


@page
def blueprint(request: HttpRequest, slug: str) -> HttpResponse:
    found = catalogue().filter(slug=slug).first()
    if found is None:
        raise Http404("there is no such blueprint")

    def uses() -> dict[str, Any]:
        return {"uses": blueprint_uses(found), "kernels": kernels_of(slug)}

    panels = [
        Panel(
            "about",
            in_sentence(found.title),
            "console/blueprints/about.html",
            lambda: {"may_switch": may(person(request), Act.SWITCH_BLUEPRINT)},
            ("blueprint",),
        ),
        Panel("uses", _("Uses"), "console/blueprints/uses.html", uses, ("adaptation",)),
        Panel(
            "variants",
            _("Variants"),
            "console/blueprints/variants.html",
            lambda: {"variants": variant_rows(found, person(request))},
            ("blueprint", "adaptation"),
        ),
    ]
    return render_page(
        request,
        "console/simple.html",
        title=in_sentence(found.title),
        intro=found.slug,  # decisions and the API say this one
        panels=panels,
        blueprint=found,
    )


def catalogue() -> QuerySet[Blueprint]:
    """The catalogue with the track record of each blueprint."""
    grafted = Q(adaptation__graft_step__isnull=False)
    return Blueprint.objects.annotate(
        used=Count("adaptation", filter=grafted),
        kept=Count("adaptation", filter=grafted & Q(adaptation__state=AdaptationState.KEPT)),
        lost=Count("adaptation", filter=grafted & Q(adaptation__state__in=_BAD_ENDS)),
        mean_reward=Avg("adaptation__reward"),
    )


def blueprint_uses(blueprint: Blueprint) -> list[Adaptation]:
    uses = (
        Adaptation.objects.filter(blueprint=blueprint)
        .select_related("run", "decided_by")
        .defer(*HUGE_COLUMNS_OF_RUN)
    )
    return list(uses[:20])


def variant_rows(blueprint: Blueprint, user: User) -> list[dict[str, Any]]:
    """Each variant with its lineage: what it was learned from, its trials, who admitted it."""
    return [_variant_row(variant, user) for variant in adaptations.variants_of(blueprint)[:20]]


def _variant_row(variant: Variant, user: User) -> dict[str, Any]:
    grafts, seen, unseen = adaptations.cases_of(variant)
    return {
        "variant": variant,
        "expected": _expected(variant),
        "grafts": grafts,
        "seen": seen,
        "unseen": unseen,
        "trials": adaptations.trials_of_variant(variant),
        "gains": adaptations.advantages(variant),
        "uses": list(Adaptation.objects.filter(variant=variant)[:20]),
        "may_admit": adaptations.may_admit(variant, user),
        "may_withdraw": adaptations.may_withdraw(variant, user),
    }


def kernels_of(slug: str) -> list[Kernel]:
    return list(Kernel.objects.filter(blueprint_slug=slug)[:20])


def _expected(variant: Variant) -> str:
    if variant.expected is None or variant.error is None:
        return _("unknown")
    return as_written(f"{signed(variant.expected)} ± {percent(variant.error)}")
