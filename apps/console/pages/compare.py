"""Two runs side by side: their losses on one axis, their numbers, and what grafts they carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from django.db.models import Count, Min, Q, Sum
from django.http import Http404, HttpRequest, HttpResponse
from django.utils.translation import gettext as _

from apps.adaptations.models import Adaptation
from apps.console.panels import Panel, render_page
from apps.console.request import page
from apps.rest.identifiers import named
from apps.runs.models import Run
from apps.telemetry.models import Metric
from apps.telemetry.selectors import metric_series
from esper.contracts import ADAPTATION_ENDED, ADAPTATION_GRAFTED, AdaptationState

POINTS = 300
WIDTH, HEIGHT = 600, 200
NAMES_SHOWN = 20
RUNS_OFFERED = 100


@page
def compare(request: HttpRequest) -> HttpResponse:
    first, second = _run(request, "a"), _run(request, "b")
    both = (first, second) if first is not None and second is not None else None

    def parts() -> dict[str, Any]:
        assert both is not None
        return {
            "chart": loss_chart(*both),
            "facts": facts(*both),
            "grafts": grafts_by_layer(*both),
            "missing": missing_layers(*both),
        }

    panels = [Panel("both", _("Side by side"), "console/compare/both.html", parts)] if both else []
    return render_page(
        request,
        "console/compare.html",
        title=_("Compare runs"),
        panels=panels,
        first=first,
        second=second,
        same=both is not None and first == second,
        whole=lambda: {
            "offered": Run.objects.only("uid", "name", "state").order_by("-id")[:RUNS_OFFERED]
        },
    )


def _run(request: HttpRequest, name: str) -> Run | None:
    wanted = request.GET.get(name, "")
    if not wanted:
        return None
    by_name = named(wanted, "R") | Q(name=wanted)
    found = Run.objects.filter(by_name).select_related("owner").order_by("-id").first()
    if found is None:
        raise Http404("there is no such run")
    return found


@dataclass(frozen=True, slots=True)
class LossChart:
    """Polylines of two losses over one axis of steps; ``marks`` are the steps of grafts, in x."""

    lines: tuple[list[str], list[str]]
    marks: tuple[list[float], list[float]]
    low: float
    high: float
    last: int


def loss_chart(first: Run, second: Run) -> LossChart | None:
    """None where neither has a loss."""
    series = [metric_series(run, "loss", points=POINTS) for run in (first, second)]
    known = [value for one in series for value in one["mean"] if value is not None]
    last = max((step for one in series for step in one["step"]), default=0)
    if not known or not last:
        return None
    low, high = min(known), max(known)
    span = (high - low) or 1.0

    def lines(one: Mapping[str, Any]) -> list[str]:
        found: list[list[str]] = [[]]
        for step, value in zip(one["step"], one["mean"], strict=True):
            if value is None:  # a gap, or a loss that is no number
                found.append([])
                continue
            y = HEIGHT - 6 - (HEIGHT - 12) * (value - low) / span
            found[-1].append(f"{WIDTH * step / last:.1f},{y:.1f}")
        return [" ".join(points) for points in found if points]

    def marks(run: Run) -> list[float]:
        steps = Adaptation.objects.filter(run=run, graft_step__lte=last)
        grafted = steps.values_list("graft_step", flat=True)
        return [WIDTH * step / last for step in grafted if step is not None]

    return LossChart(
        (lines(series[0]), lines(series[1])), (marks(first), marks(second)), low, high, last
    )


@dataclass(frozen=True, slots=True)
class Fact:
    """One number of both runs."""

    name: str
    first: Any
    second: Any


def facts(first: Run, second: Run) -> list[Fact]:
    left, right = _numbers(first), _numbers(second)
    return [Fact(name, left[name], right[name]) for name in left]


def _numbers(run: Run) -> dict[str, Any]:
    own = Adaptation.objects.filter(run=run)
    counts = own.aggregate(
        kept=Count("id", filter=Q(state=AdaptationState.KEPT)),
        taken=Count("id", filter=Q(state__in=_TAKEN_OUT)),
        refused=Count("id", filter=Q(state__in=_REFUSED)),
        open=Count("id", filter=~Q(state__in=ADAPTATION_ENDED)),
        added=Sum("forecast_parameters", filter=Q(state__in=ADAPTATION_GRAFTED)),
    )
    losses = Metric.objects.filter(run=run, name="loss").aggregate(lowest=Min("value"))
    step_ms = Metric.objects.filter(run=run, name="step_ms").order_by("-step").first()
    return {
        _("steps"): run.step,
        _("newest loss"): run.last_loss,
        _("lowest loss"): losses["lowest"],
        _("time of a step, ms"): step_ms.value if step_ms else None,
        _("parameters at the start"): run.model_parameters,
        _("parameters of grafts in the model"): counts["added"] or 0,
        _("adaptations kept"): counts["kept"],
        _("adaptations taken out"): counts["taken"],
        _("proposals refused or expired"): counts["refused"],
        _("adaptations in progress"): counts["open"],
    }


_TAKEN_OUT = (AdaptationState.ROLLED_BACK, AdaptationState.REVERTED)
_REFUSED = (AdaptationState.REJECTED, AdaptationState.EXPIRED, AdaptationState.DECLINED)


@dataclass(frozen=True, slots=True)
class LayerGrafts:
    """The grafts that are in one layer of each run now."""

    layer: str
    first: Sequence[Adaptation]
    second: Sequence[Adaptation]

    @property
    def sides(self) -> tuple[Sequence[Adaptation], Sequence[Adaptation]]:
        return self.first, self.second


def grafts_by_layer(first: Run, second: Run) -> list[LayerGrafts]:
    found: dict[str, tuple[list[Adaptation], list[Adaptation]]] = {}
    rows = Adaptation.objects.filter(
        run__in=(first, second), remedy="", state__in=ADAPTATION_GRAFTED
    )
    for row in rows.select_related("blueprint").order_by("layer", "id"):
        sides = found.setdefault(row.layer, ([], []))
        sides[0 if row.run_id == first.pk else 1].append(row)
    return [LayerGrafts(layer, *sides) for layer, sides in found.items()]


@dataclass(frozen=True, slots=True)
class MissingLayers:
    """Layers that only one of the two models has: some names, and how many there are."""

    run: Run
    count: int
    names: Sequence[str]


def missing_layers(first: Run, second: Run) -> list[MissingLayers]:
    found = []
    for run, other in ((first, second), (second, first)):
        known = {layer["name"] for layer in other.layers}
        only = [layer["name"] for layer in run.layers if layer["name"] not in known]
        if only:
            found.append(MissingLayers(run, len(only), only[:NAMES_SHOWN]))
    return found
