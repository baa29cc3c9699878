"""Runs as rows, and the parts of one run's page."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from django.db.models import Avg, Case, F, Max, OuterRef, QuerySet, Subquery, Value, When

from apps.adaptations.models import Adaptation, Remedy
from apps.console.drawing import CELL_WIDTH, Cell, Sparkline, health_cells, shade, sparkline
from apps.kernels.models import SpeedUp
from apps.runs.models import Command, Run
from apps.telemetry.models import Frame, Metric
from apps.violations.models import Violation
from esper.contracts import RUN_ENDED, SIGNAL_INDEX, CommandKind, CommandState, Signal
from esper.contracts.health import LayerInfo
from esper.exceptions import CodecError

SPARK_STEPS = 2_000
SPARK_POINTS = 50
RUNS_SHOWN = 50
COMMANDS_SHOWN = 30
LAYERS_SHOWN = 200


@dataclass(frozen=True, slots=True)
class RunRow:
    """A line of the runs table."""

    run: Run
    spark: Sparkline | None
    cells: list[Cell]
    last: Adaptation | None

    @property
    def progress(self) -> int | None:
        """Percent of the target, None without one."""
        if not self.run.target_steps:
            return None
        return min(100, round(100 * self.run.step / self.run.target_steps))

    @property
    def strip_width(self) -> int:
        return len(self.cells) * CELL_WIDTH

    @property
    def health_words(self) -> str:
        """The strip for people who do not see it; all cells while there are few."""
        return ", ".join(cell.label for cell in self.cells[:12])


def live_runs() -> QuerySet[Run]:
    return Run.objects.exclude(state__in=RUN_ENDED)


def recent_runs() -> QuerySet[Run]:
    """Live runs first, then the newest of the others."""
    return Run.objects.annotate(
        over=Case(When(state__in=RUN_ENDED, then=Value(1)), default=Value(0))
    ).order_by("over", "-id")


def run_rows(runs: QuerySet[Run]) -> list[RunRow]:
    """Rows with sparkline, health strip and last adaptation: five queries for any number."""
    newest_frame = Frame.objects.filter(run=OuterRef("pk")).order_by("-step").values("pk")[:1]
    newest_adaptation = (
        Adaptation.objects.filter(run=OuterRef("pk")).order_by("-id").values("pk")[:1]
    )
    found = list(
        runs.select_related("owner").annotate(
            frame_id=Subquery(newest_frame), adaptation_id=Subquery(newest_adaptation)
        )[:RUNS_SHOWN]
    )
    frames = Frame.objects.in_bulk([run.frame_id for run in found if run.frame_id])
    adaptations = Adaptation.objects.select_related("blueprint").in_bulk(
        [run.adaptation_id for run in found if run.adaptation_id]
    )
    lines = _sparklines(found)
    return [
        RunRow(
            run=run,
            spark=lines.get(run.pk),
            cells=health_cells(_health(run, frames.get(run.frame_id or 0))),
            last=adaptations.get(run.adaptation_id or 0),
        )
        for run in found
    ]


def _sparklines(runs: Iterable[Run]) -> dict[int, Sparkline | None]:
    """The loss of the newest ``SPARK_STEPS`` steps of each run, averaged by the database."""
    rows = (
        Metric.objects.filter(
            run__in=[run.pk for run in runs], name="loss", step__gt=F("run__step") - SPARK_STEPS
        )
        .order_by()
        .annotate(bucket=(F("run__step") - F("step")) / (SPARK_STEPS // SPARK_POINTS))
        .values("run_id", "bucket")
        .annotate(mean=Avg("value"), bad=Max("status"))
        .order_by("run_id", "-bucket")  # counted from the newest step, so that its bucket is whole
    )
    values: dict[int, list[float | None]] = defaultdict(list)
    for row in rows:
        values[row["run_id"]].append(None if row["bad"] else row["mean"])
    return {run: sparkline(series) for run, series in values.items()}


def _health(run: Run, frame: Frame | None) -> dict[str, float]:
    """Health by layer, NaN for unknown; empty when the frame is not one of this epoch's layers."""
    values = _matrix(run, frame)
    if values is None:
        return {}
    column = values[:, SIGNAL_INDEX[Signal.HEALTH]]
    return {layer["name"]: float(column[i]) for i, layer in enumerate(run.layers)}


def _matrix(run: Run, frame: Frame | None) -> Any:
    if frame is None:
        return None
    try:
        return frame.matrix(len(run.layers))
    except CodecError:  # a frame of an earlier epoch with other layers
        return None


def get_run(uid: str) -> Run | None:
    return Run.objects.select_related("owner").filter(uid=uid).first()


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    """Something that happened to a run at a step."""

    step: int | None
    at: datetime
    adaptation: Adaptation | None = None
    violation: Violation | None = None
    remedy: Remedy | None = None
    speed_up: SpeedUp | None = None
    number: int | None = None  # of the adaptation whose kernel that is


def timeline(run: Run, *, most: int = 60) -> list[TimelineEntry]:
    """Adaptations, violations, compiled kernels, and what the script did, newest first."""
    adaptations = Adaptation.objects.filter(run=run).select_related("blueprint", "decided_by")
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
    """Compiled kernels that the trainer has tried, at the step at which it answered."""
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
    """Where grafts went in, for the chart and the heat map."""
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
    """Layers in the order of the model, with what the newest frame says of them."""
    frame = Frame.objects.filter(run=run).order_by("-step").first()
    values = _matrix(run, frame)
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
    """What was asked of the trainer, and what it answered; never taken for granted."""

    paused: bool
    command: Command | None

    @property
    def pending(self) -> bool:
        return self.command is not None and self.command.state in (
            CommandState.ISSUED,
            CommandState.ACCEPTED,
        )


def pause_state(run: Run) -> PauseState:
    newest = Command.objects.filter(run=run, kind__in=_PAUSE_KINDS).order_by("-seq").first()
    return PauseState(bool(run.adaptation_paused_by), newest)


def stop_command(run: Run) -> Command | None:
    return Command.objects.filter(run=run, kind=CommandKind.STOP_RUN).order_by("-seq").first()


def latest_metrics(run: Run, names: Sequence[str]) -> dict[str, Metric]:
    """The newest value of each metric."""
    newest = (
        Metric.objects.filter(run=run, name=OuterRef("name")).order_by("-step").values("pk")[:1]
    )
    rows = Metric.objects.filter(run=run, name__in=names, pk=Subquery(newest))
    return {metric.name: metric for metric in rows}
