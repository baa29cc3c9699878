"""Reading telemetry: for Tamiyo, for charts, for the heat map."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from apps.runs.models import Run
from apps.telemetry.models import Frame, Metric
from esper.contracts import SIGNAL_INDEX, SIGNALS, Signal, columns_of, protocol, unpack_bytes
from esper.contracts.protocol import StepValues

MAX_FRAMES = 200
SNAPSHOT_FRAMES = 64
SNAPSHOT_FRAME_BYTES = 4 * 1024 * 1024
FEWEST_SNAPSHOT_FRAMES = 8
SNAPSHOT_LOSSES = 2000
MAX_POINTS = 5000
MAX_COLUMNS = 500
DIGITS = 5  # significant ones of a signal in an answer
ABLATION = "ablation_"  # gain and loss of each graft that is switched off for a moment


def frame_message(frame: Frame) -> protocol.Frame:
    return protocol.Frame(
        step=frame.step,
        wall_time=frame.wall_time,
        values=bytes(frame.values),
        loss=frame.known_loss,
    )


def frames_after(run: Run, *, after_step: int, limit: int) -> list[Frame]:
    """Frames of this epoch, oldest first. Older epochs may have had other layers."""
    frames = Frame.objects.filter(run=run, epoch=run.epoch, step__gt=after_step)
    return list(frames.order_by("step", "id")[:limit])


def newest_frames(run: Run) -> list[protocol.Frame]:
    """The frames for a decision, oldest first; fewer for a huge model.

    Without the losses that :func:`newest_metrics` leaves out.
    """
    frame_bytes = max(1, len(run.layers) * len(SIGNALS) * 4)
    count = SNAPSHOT_FRAME_BYTES // frame_bytes
    count = max(FEWEST_SNAPSHOT_FRAMES, min(SNAPSHOT_FRAMES, count))
    frames = Frame.objects.filter(run=run, epoch=run.epoch).order_by("-step", "-id")[:count]
    return [
        frame_message(frame)
        if led_to_its_weights(run, frame.epoch, frame.step)
        else msgspec.structs.replace(frame_message(frame), loss=None)
        for frame in list(frames)[::-1]
    ]


def led_to_its_weights(run: Run, epoch: int, step: int, *, at: int | None = None) -> bool:
    """The run's weights came out of this step; False for what an undo took back.

    Args:
        at: the weights of this step; None: the present ones.
    """
    return not any(
        epoch == of_epoch and after < step <= last and (at is None or last <= at)
        for of_epoch, after, last in run.taken_back
    )


def newest_metrics(run: Run) -> list[StepValues]:
    """The recent losses that led to the run's weights, and all looks at grafts in probation.

    Oldest first. Losses that an undo took back measure neither the run nor its next graft.
    """
    columns = ("epoch", "step", "name", "value", "status")
    of_run = Metric.objects.filter(run=run).values_list(*columns)
    losses = list(of_run.filter(name="loss").order_by("-id")[:SNAPSHOT_LOSSES])
    rows = [row for row, alive in zip(losses, _alive(losses), strict=True) if alive]
    rows = [row for row in rows if led_to_its_weights(run, row[0], row[1])]
    rows += of_run.filter(name__startswith=ABLATION).order_by("id")
    return _by_step(rows)


def metrics_after(run: Run, names: Sequence[str], *, step: int) -> list[StepValues]:
    """All values of a few metrics, oldest first."""
    columns = ("epoch", "step", "name", "value", "status")
    found = Metric.objects.filter(run=run, name__in=names, step__gt=step).order_by("id")
    return _by_step(found.values_list(*columns))


def _by_step(rows: Iterable[tuple[int, int, str, float, str]]) -> list[StepValues]:
    by_step: defaultdict[int, dict[str, float]] = defaultdict(dict)
    for _, step, name, value, status in rows:
        by_step[step][name] = float(status) if status else value
    return [StepValues(step=step, values=values) for step, values in sorted(by_step.items())]


def metric_series(
    run: Run,
    name: str,
    *,
    points: int,
    after_step: int = -1,
    up_to_step: int | None = None,
    width: int | None = None,
) -> dict[str, Any]:
    """One metric in at most ``points`` buckets of equal length: columns, for charts.

    A bucket without a finite value has null; ``non_finite`` lists the steps where it diverged.

    Args:
        width: of each bucket in steps, which then begin at its multiples. A reader that follows a
            run asks for the same width again, so that new values look as smooth as the old ones.
    """
    steps, values, rows = _finite_and_not(run, name, after_step, up_to_step)
    edges = _edges_of_width(steps, width) if width else _equal_edges(steps, points)
    series: dict[str, Any] = {"name": name, **_buckets(steps, values, edges)}
    series["width"] = width or _width(steps, points)
    series["non_finite"] = [
        {"step": step, "value": status} for _, step, _, status in rows if status
    ][-MAX_POINTS:]
    return series


def losses_between(
    run: Run, *, after_step: int, up_to_step: int | None = None, taken_back: bool = True
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps and losses of the run's present history; NaN where a loss was not finite.

    Args:
        taken_back: with the losses that had been taken back before ``up_to_step``.
    """
    steps, losses, rows = _finite_and_not(run, "loss", after_step, up_to_step)
    if taken_back or not run.taken_back:
        return steps, losses
    kept = [led_to_its_weights(run, epoch, step, at=up_to_step) for epoch, step, _, _ in rows]
    known = np.array(kept, dtype=bool)
    return steps[known], losses[known]


def _finite_and_not(
    run: Run, name: str, after_step: int, up_to_step: int | None
) -> tuple[NDArray[np.int64], NDArray[np.float64], list[tuple[Any, ...]]]:
    found = Metric.objects.filter(run=run, name=name, step__gt=after_step)
    if up_to_step is not None:
        found = found.filter(step__lte=up_to_step)
    rows = list(found.order_by("step", "id").values_list("epoch", "step", "value", "status"))
    rows = [row for row, alive in zip(rows, _alive(rows), strict=True) if alive]
    steps = np.array([step for _, step, _, _ in rows], dtype=np.int64)
    values = np.array([np.nan if value is None else value for _, _, value, _ in rows])
    return steps, values, rows


def layer_series(
    run: Run, layer: str, signal: Signal, *, after_step: int, up_to_step: int, points: int
) -> tuple[list[int], list[float | None]]:
    """One signal of one layer between two steps, from at most ``points`` frames."""
    names = [entry["name"] for entry in run.layers]
    if layer not in names:
        return [], []
    found = Frame.objects.filter(
        run=run, epoch=run.epoch, step__gt=after_step, step__lte=up_to_step
    )
    chosen = _evenly(list(found.order_by("step").values_list("id", flat=True)), points)
    frames = Frame.objects.filter(pk__in=chosen).order_by("step")
    place = (names.index(layer), SIGNAL_INDEX[signal])
    values = [
        unpack_bytes(bytes(frame.values), len(names))[place]
        if columns_of(len(frame.values), len(names))
        else np.nan
        for frame in frames
    ]
    return [frame.step for frame in frames], [_rounded(float(value)) for value in values]


def _equal_edges(steps: NDArray[np.int64], points: int) -> NDArray[Any]:
    """The lower ends of ``points`` buckets of equal length."""
    if not steps.size:
        return steps
    return np.linspace(steps[0], steps[-1] + 1, min(points, steps.size) + 1)[:-1]


def _edges_of_width(steps: NDArray[np.int64], width: int) -> NDArray[Any]:
    if not steps.size:
        return steps
    return np.unique(steps // width) * width


def _width(steps: NDArray[np.int64], points: int) -> int:
    """A width that gives about ``points`` buckets of these steps."""
    return max(1, math.ceil((int(steps[-1] - steps[0]) + 1) / points)) if steps.size else 1


def _buckets(
    steps: NDArray[np.int64], values: NDArray[np.float64], edges: NDArray[Any]
) -> dict[str, list[Any]]:
    """Each bucket reaches from its edge to the next one."""
    if not steps.size:
        return {"step": [], "min": [], "mean": [], "max": []}
    starts = np.unique(np.searchsorted(steps, edges))
    lasts = np.append(starts[1:], steps.size) - 1
    known = np.isfinite(values)
    counts = np.add.reduceat(known.astype(np.int64), starts)
    filled = counts > 0
    lows = np.minimum.reduceat(np.where(known, values, np.inf), starts)
    highs = np.maximum.reduceat(np.where(known, values, -np.inf), starts)
    with np.errstate(over="ignore"):  # a sum may overflow where each value fits; so clip
        sums = np.add.reduceat(np.where(known, values, 0.0), starts)
        means = np.clip(sums / np.maximum(counts, 1), lows, highs)
    return {
        "step": steps[lasts].tolist(),
        "min": _with_gaps(lows, filled),
        "mean": _with_gaps(means, filled),
        "max": _with_gaps(highs, filled),
    }


def _with_gaps(values: NDArray[np.float64], filled: NDArray[np.bool_]) -> list[float | None]:
    return [value if there else None for value, there in zip(values.tolist(), filled, strict=True)]


def heatmap(run: Run, signal: Signal, *, columns: int) -> dict[str, Any]:
    """One signal over layers and time: ``values[layer][column]``, null if not measured."""
    names = [layer["name"] for layer in run.layers]
    rows = list(
        Frame.objects.filter(run=run).order_by("step", "id").values_list("epoch", "step", "id")
    )
    rows = [row for row, alive in zip(rows, _alive(rows), strict=True) if alive]
    chosen = _evenly([key for _, _, key in rows], columns)
    frames = [
        frame
        for frame in Frame.objects.filter(pk__in=chosen).order_by("step", "id")
        if columns_of(len(frame.values), len(names))  # an older epoch may have had other layers
    ]
    matrix = [
        unpack_bytes(bytes(frame.values), len(names))[:, SIGNAL_INDEX[signal]] for frame in frames
    ]
    cells = np.stack(matrix, axis=1) if matrix else np.empty((len(names), 0), dtype=np.float32)
    return {
        "signal": str(signal),
        "layers": names,
        "step": [frame.step for frame in frames],
        "values": _cells(cells),
    }


def _evenly(keys: list[int], count: int) -> list[int]:
    if len(keys) <= count:
        return keys
    places = np.linspace(0, len(keys) - 1, count).round().astype(int)
    return [keys[place] for place in places]


def _cells(values_LC: NDArray[np.float32]) -> list[list[float | None]]:
    """Rounded to ``DIGITS``, all at once; null where not measured."""
    known_LC = np.isfinite(values_LC)
    wide_LC = np.where(known_LC, values_LC, 0.0).astype(np.float64)
    size_LC = np.floor(np.log10(np.abs(wide_LC), where=wide_LC != 0.0, out=np.zeros_like(wide_LC)))
    # Powers of ten are exact up to 22, their inverses are not: so multiply or divide.
    power_LC = 10.0 ** np.abs(DIGITS - 1 - size_LC)
    small_LC = np.rint(wide_LC * power_LC) / power_LC
    rounded_LC = np.where(size_LC < DIGITS, small_LC, np.rint(wide_LC / power_LC) * power_LC)
    rows: list[list[float | None]] = rounded_LC.tolist()
    for row, column in zip(*np.nonzero(~known_LC), strict=True):
        rows[row][column] = None
    return rows


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None


def _alive(rows: Sequence[tuple[Any, ...]]) -> list[bool]:
    """Which (epoch, step, …) rows belong to the present history of the run.

    A trainer that resumes from a checkpoint goes back some steps: the steps of the former epoch
    beyond that point are not part of the model's history.
    """
    begins: dict[int, int] = {}
    for epoch, step, *_ in rows:
        begins[epoch] = min(step, begins.get(epoch, step))
    limits: dict[int, float] = {}
    limit = float("inf")
    for epoch in sorted(begins, reverse=True):
        limits[epoch] = limit
        limit = min(limit, begins[epoch])
    return [step < limits[epoch] for epoch, step, *_ in rows]
