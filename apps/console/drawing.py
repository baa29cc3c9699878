"""Geometry of small inline SVG pictures. Colours are classes of the style sheet, because the
content security policy allows no inline style.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from django.utils.translation import gettext as _
from django.utils.translation import gettext_noop

from apps.console.language import as_written
from esper.contracts import GraftKind, SafetyPolicy

# Characters that fit into the boxes of the sketch.
NEIGHBOUR_LABEL, LAYER_LABEL, GRAFT_LABEL = 11, 16, 19
CELL_WIDTH = 8


@dataclass(frozen=True, slots=True)
class Sparkline:
    """A line in a 150 × 30 box; ``marks`` are x positions of values that were not finite."""

    points: str
    marks: tuple[float, ...]


def sparkline(
    values: Sequence[float | None], *, width: float = 150, height: float = 30
) -> Sparkline | None:
    """None when there is nothing to draw. ``None`` in ``values`` means: not a finite number."""
    finite = [value for value in values if value is not None]
    if len(values) < 2 or not finite:
        return None
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    pace = width / (len(values) - 1)

    def y(value: float) -> float:
        return height - 2 - (height - 4) * (value - low) / span

    points = " ".join(
        f"{i * pace:.1f},{y(value):.1f}" for i, value in enumerate(values) if value is not None
    )
    marks = tuple(round(i * pace, 1) for i, value in enumerate(values) if value is None)
    return Sparkline(points, marks)


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at a step."""

    step: int
    word: str


@dataclass(frozen=True, slots=True)
class MarkLine:
    x: float
    word: str
    step: int


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve over steps in a box of ``CURVE_BOX``. Its numbers are written beside it."""

    name: str
    lines: tuple[str, ...]  # points of the pieces between gaps
    area: str  # between the lowest and the highest values; empty without bounds
    marks: tuple[MarkLine, ...]
    band: tuple[float, float, float] | None  # x, y and height of a forecast with its interval
    limit_y: float | None
    low: float
    high: float
    first: int
    last: int
    newest: float | None
    is_log: bool = False  # the axis is logarithmic

    @property
    def words(self) -> str:
        """The picture as a sentence, for people who cannot see it."""
        known = self.newest is not None
        marks = "".join(
            _(", %(mark)s at step %(step)s")
            % {"mark": mark.word, "step": as_written(f"{mark.step:,}")}
            for mark in self.marks
        )
        return _(
            "%(name)s from step %(first)s to %(last)s: between %(low)s and %(high)s, last "
            "%(newest)s%(marks)s."
        ) % {
            "name": self.name,
            "first": as_written(f"{self.first:,}"),
            "last": as_written(f"{self.last:,}"),
            "low": as_written(f"{self.low:.4g}"),
            "high": as_written(f"{self.high:.4g}"),
            "newest": as_written(f"{self.newest:.4g}") if known else _("unknown"),
            "marks": marks,
        }


CURVE_BOX = (600.0, 120.0)
_SPIKE = 30  # so many times the usual value: a linear axis would show the spike alone


def curve(
    name: str,
    steps: Sequence[int],
    values: Sequence[float | None],
    *,
    marks: Sequence[Mark] = (),
    bounds: tuple[Sequence[float | None], Sequence[float | None]] | None = None,
    until: int | None = None,
    band: tuple[int, float, float] | None = None,
    limit: float | None = None,
    scale: tuple[float, float] | None = None,
) -> Curve | None:
    """None when there is nothing to draw; a None in ``values`` is a gap.

    Args:
        bounds: lowest and highest values, drawn as an area.
        until: the axis reaches to this step, even where no value is known yet.
        band: (from step, low, high) of a forecast, to the end of the axis.
        limit: a horizontal line.
        scale: lowest and highest value of the axis; by the values without it.
    """
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    extremes = [*known, *((limit,) if limit is not None else ()), *(band[1:] if band else ())]
    low, high = scale or (min(extremes), max(extremes))
    is_log = scale is None and low > 0 and high > _SPIKE * median(known)
    width, height = CURVE_BOX
    first, last = steps[0], max(steps[-1], until or 0)
    span, rise = (last - first) or 1, (high - low) or 1.0

    def x(step: float) -> float:
        return round(width * (step - first) / span, 1)

    def y(value: float) -> float:
        inside = min(max(value, low), high)
        share = math.log(inside / low) / math.log(high / low) if is_log else (inside - low) / rise
        return float(round(height - 4 - (height - 8) * share, 1))

    return Curve(
        name=name,
        lines=tuple(
            " ".join(f"{x(step)},{y(value)}" for step, value in piece)
            for piece in _pieces(steps, values)
        ),
        area=_area(steps, bounds, x, y) if bounds else "",
        marks=tuple(
            MarkLine(x(mark.step), mark.word, mark.step)
            for mark in marks
            if first <= mark.step <= last
        ),
        band=(x(max(first, band[0])), y(band[2]), max(1.0, y(band[1]) - y(band[2])))
        if band
        else None,
        limit_y=None if limit is None else y(limit),
        low=low,
        high=high,
        first=first,
        last=last,
        newest=values[-1],
        is_log=is_log,
    )


def _pieces(steps: Sequence[int], values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    pieces: list[list[tuple[int, float]]] = [[]]
    for step, value in zip(steps, values, strict=True):
        if value is not None:
            pieces[-1].append((step, value))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _area(
    steps: Sequence[int],
    bounds: tuple[Sequence[float | None], Sequence[float | None]],
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> str:
    rows = [
        (step, low, high)
        for step, low, high in zip(steps, *bounds, strict=True)
        if low is not None and high is not None
    ]
    up = [f"{x(step)},{y(high)}" for step, _, high in rows]
    return " ".join([*up, *(f"{x(step)},{y(low)}" for step, low, _ in reversed(rows))])


@dataclass(frozen=True, slots=True)
class Cell:
    x: int
    shade: str  # class h0 … h9, or hx for unknown
    poor: bool
    label: str


def health_cells(health: Mapping[str, float], *, most: int = 24) -> list[Cell]:
    """One cell for each layer. Too many layers share cells; a cell shows its lowest health."""
    names = list(health)
    size = max(1, math.ceil(len(names) / most))
    groups = [names[i : i + size] for i in range(0, len(names), size)]
    return [_cell(i, group, health) for i, group in enumerate(groups)]


def _cell(position: int, names: Sequence[str], health: Mapping[str, float]) -> Cell:
    known = [health[name] for name in names if math.isfinite(health[name])]
    worst = min(known) if known else math.nan
    said = as_written(f"{worst:.2f}") if known else _("unknown")
    label = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
    return Cell(
        position * CELL_WIDTH, shade(worst), bool(known) and worst < 0.4, f"{label}: {said}"
    )


def shade(health: float) -> str:
    """Health 0..1 as a class of ten cividis steps."""
    if not math.isfinite(health):
        return "hx"
    return f"h{min(9, max(0, int(health * 10)))}"


@dataclass(frozen=True, slots=True)
class Band:
    """Widths of refuse, ask and auto on a scale that is 600 wide."""

    refuse: float
    ask: float
    auto: float  # where it begins
    rest: float


def confidence_band(policy: SafetyPolicy) -> Band:
    refuse, auto = 600 * policy.confidence_refuse, 600 * policy.confidence_auto
    return Band(refuse, auto - refuse, auto, 600 - auto)


@dataclass(frozen=True, slots=True)
class Bar:
    """A horizontal bar around zero, in a box that is 200 wide with its zero at 100."""

    x: float
    width: float
    positive: bool


def signed_bar(value: float, largest: float) -> Bar:
    length = 0.0 if largest <= 0 else 96 * min(1.0, abs(value) / largest)
    return Bar(100 if value >= 0 else 100 - length, max(length, 1.5), value >= 0)


@dataclass(frozen=True, slots=True)
class Fall:
    """One row of a waterfall: its bar starts where the sum before it ended."""

    name: str
    value: float
    x: float
    width: float
    total: float


def waterfall(terms: Mapping[str, float], *, width: float = 300) -> list[Fall]:
    """Rows of a reward's terms, scaled so that all of them fit between the extremes of the sum."""
    sums = [0.0]
    for value in terms.values():
        sums.append(sums[-1] + value)
    low, high = min(sums), max(sums)
    scale = width / ((high - low) or 1.0)
    return [
        Fall(
            name=name,
            value=value,
            x=round((min(before, before + value) - low) * scale, 1),
            width=round(max(abs(value) * scale, 1.5), 1),
            total=before + value,
        )
        for (name, value), before in zip(terms.items(), sums, strict=False)
    ]


@dataclass(frozen=True, slots=True)
class Sketch:
    """What the picture of a graft shows: the neighbours' names, and how the graft is joined."""

    before: str
    layer: str
    after: str
    graft: str
    join: str  # parallel, scale, replace, wrap, observe
    words: str  # the picture as a sentence, for people who cannot see it


_WORDS: dict[str, str] = {
    "parallel": gettext_noop(
        "{graft} runs beside {layer}; its output is added and starts at zero."
    ),
    "scale": gettext_noop("The output of {layer} is multiplied by {graft}, which starts at one."),
    "replace": gettext_noop(
        "{graft} replaces {layer} gradually; its share of the output starts at zero."
    ),
    "wrap": gettext_noop("{layer} stays as it is; {graft} changes its gradient."),
    "observe": gettext_noop("{layer} stays as it is; {graft} only measures its output."),
}


def sketch(layer: str, graft: str, kind: str, *, before: str, after: str) -> Sketch:
    """The parts of the before/after picture; a kind without a picture is drawn as parallel."""
    join = kind if kind in _WORDS else str(GraftKind.PARALLEL)
    return Sketch(
        before=shorten(before, NEIGHBOUR_LABEL),
        layer=shorten(layer, LAYER_LABEL),
        after=shorten(after, NEIGHBOUR_LABEL),
        graft=shorten(graft, GRAFT_LABEL),
        join=join,
        words=_(_WORDS[join]).format(graft=graft, layer=layer),
    )


def shorten(text: str, most: int) -> str:
    """Cut in the middle: the ends of a layer's name tell it from its neighbours."""
    if len(text) <= most:
        return text
    half = (most - 1) // 2
    return f"{text[:half]}…{text[-half:]}"
