"""One run: its state, timeline, layers and commands."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from django.db.models import OuterRef, Subquery
from django.http import Http404, HttpRequest, HttpResponse

from apps.accounts.policy import Act, may
from apps.adaptations.models import Adaptation, Remedy
from apps.console.bar import adaptation_switch
from apps.console.drawing import shade
from apps.console.panels import Panel, render_page
from apps.console.request import page, person
from apps.console.run_rows import frame_matrix
from apps.kernels.models import SpeedUp
from apps.notifications.services import run_topic
from apps.recipes.models import Launch
from apps.recipes.selectors import launches
from apps.runs.models import Command, Run
from apps.telemetry.models import Frame, Metric
from apps.violations.models import Violation
from esper.contracts import SIGNAL_INDEX, CommandKind, CommandState, Signal
from esper.contracts.health import LayerInfo

COMMANDS_SHOWN = 30
LAYERS_SHOWN = 200


@page
def run(request: HttpRequest, uid: str) -> HttpResponse:
    found = get_run(uid)
    if found is None:
        raise Http404("there is no such run")
    return render_page(
        request,
        "console/run.html",
        title=found.name,
        panels=_run_panels(request, found),
        topics=[run_topic(found.uid)],
        run=found,
        whole=lambda: {"markers": chart_markers(found), "signals": list(Signal)},
    )


def _run_panels(request: HttpRequest, run: Run) -> list[Panel]:
    user = person(request)
    only_poor = request.GET.get("layers") == "poor"

    def head() -> dict[str, Any]:
        return {
            "pause": pause_state(run),
            "stop": stop_command(run),
            "launch": launch_of(run),
            "metrics": latest_metrics(run, ("step_ms", "lr")),
            "may_pause": may(user, Act.PAUSE_ADAPTATION, owner_id=run.owner_id),
            "may_stop": may(user, Act.STOP_RUN, owner_id=run.owner_id),
        }

    def layers() -> dict[str, Any]:
        rows = layer_rows(run, only_poor=only_poor)
        return {"rows": rows, "shown_signals": SHOWN_SIGNALS, "only_poor": only_poor}

    return [
        Panel("head", "Run", "console/run/head.html", head, ("run", "switch"), every=5),
        Panel(
            "timeline",
            "Adaptations, compiled kernels, remedies and violations",
            "console/run/timeline.html",
            lambda: {"entries": timeline(run)},
            ("adaptation", "remedy", "violation", "kernel"),
        ),
        Panel("layers", "Layers", "console/run/layers.html", layers, ("adaptation",), every=10),
        Panel(
            "commands",
            "Commands to the trainer",
            "console/run/commands.html",
            lambda: {"commands": commands(run)},
            ("run", "adaptation"),
        ),
    ]


def get_run(uid: str) -> Run | None:
    return Run.objects.select_related("owner").filter(uid=uid).first()


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    """One event of a run at a step."""

    step: int | None
    at: datetime
    adaptation: Adaptation | None = None
    violation: Violation | None = None
    remedy: Remedy | None = None
    speed_up: SpeedUp | None = None
    number: int | None = None  # of the adaptation whose kernel that is


def timeline(run: Run, *, most: int = 60) -> list[TimelineEntry]:
    """Adaptations, violations, compiled kernels and remedies of the script, newest first."""
    adaptations = Adaptation.objects.filter(run=run).select_related(
        "blueprint", "decided_by", "taken_back_by"
    )
    entries = [
        TimelineEntry(
            step=adaptation.graft_step or adaptation.proposed_step,
            at=adaptation.created_at,
            adaptation=adaptation,
        )
        for adaptation in adaptations[:most]
    ]
    entries += [
        TimelineEntry(step=violation.step, at=violation.created_at, violation=violation)
        for violation in Violation.objects.filter(run=run)[:most]
    ]
    remedies = Remedy.objects.filter(run=run).select_related("adaptation", "undoes", "undone_by")
    entries += [
        TimelineEntry(step=remedy.step, at=remedy.created_at, remedy=remedy)
        for remedy in remedies[:most]
    ]
    entries += _tried_kernels(run, most)
    return sorted(entries, key=lambda entry: entry.at, reverse=True)[:most]


def _tried_kernels(run: Run, most: int) -> list[TimelineEntry]:
    """Compiled kernels that the trainer has tried, with the step of its answer."""
    found = SpeedUp.objects.filter(run_uid=run.uid, speedup__isnull=False, ended_at__isnull=False)
    trials = list(found.order_by("-id")[:most])
    uids = [trial.adaptation_uid for trial in trials]
    answers = Command.objects.filter(
        run=run, kind=CommandKind.SPEED_UP, adaptation_uid__in=uids
    ).values_list("adaptation_uid", "step")
    steps = dict(answers)
    numbers = dict(Adaptation.objects.filter(uid__in=uids).values_list("uid", "pk"))
    return [
        TimelineEntry(
            step=steps.get(trial.adaptation_uid),
            at=trial.ended_at,
            speed_up=trial,
            number=numbers.get(trial.adaptation_uid),
        )
        for trial in trials
        if trial.ended_at is not None
    ]


def chart_markers(run: Run) -> list[dict[str, Any]]:
    """The steps of the grafts, for the chart and the heat map."""
    rows = (
        Adaptation.objects.filter(run=run)
        .exclude(graft_step=None)
        .order_by("graft_step")
        .values("pk", "uid", "graft_step", "state", "layer", "blueprint__slug")
    )
    return [
        {
            "number": row["pk"],
            "uid": row["uid"],
            "step": row["graft_step"],
            "state": row["state"],
            "layer": row["layer"],
            "blueprint": row["blueprint__slug"],
        }
        for row in rows
    ]


@dataclass(frozen=True, slots=True)
class LayerRow:
    """A layer with its newest signals; None means not measured."""

    info: LayerInfo
    signals: dict[str, float | None]
    shade: str
    adaptations: list[Adaptation] = field(default_factory=list)


SHOWN_SIGNALS = (
    Signal.HEALTH,
    Signal.GRAD_NORM,
    Signal.UPDATE_RATIO,
    Signal.DEAD_FRACTION,
    Signal.SATURATION,
    Signal.STABLE_RANK,
)


def layer_rows(run: Run, *, only_poor: bool = False) -> list[LayerRow]:
    """Layers in the order of the model, with their values in the newest frame."""
    frame = Frame.objects.filter(run=run).order_by("-step").first()
    values = frame_matrix(run, frame)
    by_layer: dict[str, list[Adaptation]] = defaultdict(list)
    for adaptation in Adaptation.objects.filter(run=run).select_related("blueprint"):
        by_layer[adaptation.layer].append(adaptation)
    rows = [_layer_row(run, i, values, by_layer) for i in range(len(run.layers))]
    if only_poor:
        rows = [row for row in rows if (row.signals[Signal.HEALTH] or 1.0) < 0.5]
    return rows[:LAYERS_SHOWN]


def _layer_row(
    run: Run, position: int, values: Any, by_layer: dict[str, list[Adaptation]]
) -> LayerRow:
    info = LayerInfo.from_wire(run.layers[position])
    signals = {
        str(signal): None if values is None else _known(values[position][SIGNAL_INDEX[signal]])
        for signal in SHOWN_SIGNALS
    }
    health = signals[Signal.HEALTH]
    return LayerRow(
        info=info,
        signals=signals,
        shade=shade(math.nan if health is None else health),
        adaptations=by_layer.get(info.name, []),
    )


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def commands(run: Run) -> list[Command]:
    return list(Command.objects.filter(run=run).order_by("-seq")[:COMMANDS_SHOWN])


_PAUSE_KINDS = (CommandKind.PAUSE_ADAPTATION, CommandKind.RESUME_ADAPTATION)


@dataclass(frozen=True, slots=True)
class PauseState:
    """Whether a pause was requested, and the command with the trainer's answer."""

    paused: bool
    command: Command | None
    killed_by: str = ""  # who has switched off all adaptation; empty while it is on

    @property
    def pending(self) -> bool:
        return self.command is not None and self.command.state in (
            CommandState.ISSUED,
            CommandState.ACCEPTED,
        )


def pause_state(run: Run) -> PauseState:
    newest = Command.objects.filter(run=run, kind__in=_PAUSE_KINDS).order_by("-seq").first()
    switch = adaptation_switch()
    killed_by = "" if switch.on else switch.changed_by
    return PauseState(bool(run.adaptation_paused_by), newest, killed_by)


def stop_command(run: Run) -> Command | None:
    return Command.objects.filter(run=run, kind=CommandKind.STOP_RUN).order_by("-seq").first()


def latest_metrics(run: Run, names: Sequence[str]) -> dict[str, Metric]:
    """The newest value of each metric."""
    newest = (
        Metric.objects.filter(run=run, name=OuterRef("name")).order_by("-step").values("pk")[:1]
    )
    rows = Metric.objects.filter(run=run, name__in=names, pk=Subquery(newest))
    return {metric.name: metric for metric in rows}


def launch_of(run: Run) -> Launch | None:
    """The launch that started the run; None for a run that was started elsewhere."""
    return launches().filter(run_uid=run.uid).first()
