"""The rows of the runs table, for the overview and the list of runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from django.db.models import Avg, Case, F, Max, OuterRef, QuerySet, Subquery, Value, When

from apps.adaptations.models import Adaptation
from apps.console.drawing import CELL_WIDTH, Cell, Sparkline, health_cells, sparkline
from apps.runs.models import Run
from apps.runs.selectors import HUGE_COLUMNS
from apps.telemetry.models import Frame, Metric
from esper.contracts import RUN_ENDED, SIGNAL_INDEX, Signal
from esper.exceptions import CodecError

SPARK_STEPS = 2_000
SPARK_POINTS = 50


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
        """The strip as text, for people who cannot see it; at most 12 cells."""
        return ", ".join(cell.label for cell in self.cells[:12])


def live_runs() -> QuerySet[Run]:
    return Run.objects.defer(*HUGE_COLUMNS).exclude(state__in=RUN_ENDED)


def recent_runs() -> QuerySet[Run]:
    """Live runs first, then the newest of the others."""
    return Run.objects.annotate(
        over=Case(When(state__in=RUN_ENDED, then=Value(1)), default=Value(0))
    ).order_by("over", "-id")


def newest_of(runs: QuerySet[Run], most: int) -> QuerySet[Run]:
    """The first ``most`` of ``runs``, annotated for ``run_rows``.

    Chosen by their keys alone: a database would look up the frames of all runs, and sort them with
    the layers of their models.
    """
    return annotated(runs.defer(None).filter(pk__in=runs.values("pk")[:most]))


def annotated(runs: QuerySet[Run]) -> QuerySet[Run]:
    """Runs with the keys of their newest frame and adaptation, for ``run_rows``."""
    newest_frame = Frame.objects.filter(run=OuterRef("pk")).order_by("-step").values("pk")[:1]
    newest_adaptation = (
        Adaptation.objects.filter(run=OuterRef("pk")).order_by("-id").values("pk")[:1]
    )
    return (
        runs.select_related("owner")
        .defer("versions")
        .annotate(frame_id=Subquery(newest_frame), adaptation_id=Subquery(newest_adaptation))
    )


def run_rows(runs: Iterable[Run]) -> list[RunRow]:
    """Rows of ``annotated`` runs with sparkline, health strip and last adaptation."""
    found: list[Any] = list(runs)
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
    values = frame_matrix(run, frame)
    if values is None:
        return {}
    column = values[:, SIGNAL_INDEX[Signal.HEALTH]]
    return {layer["name"]: float(column[i]) for i, layer in enumerate(run.layers)}


def frame_matrix(run: Run, frame: Frame | None) -> Any:
    if frame is None:
        return None
    try:
        return frame.matrix(len(run.layers))
    except CodecError:  # a frame of an earlier epoch with other layers
        return None
