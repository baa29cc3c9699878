"""A run on one screen: as text for a terminal, as HTML for a notebook."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from esper.console import printable
from esper.contracts import HealthFrame, LayerInfo, Signal
from esper.diagnosis.base import amount
from esper.sdk.explaining import Reasons
from esper.sdk.parts import Parts
from esper.tables import aligned, cut, html_list, html_table

MOST_ROWS = 12
MOST_ENTRIES = 10
COLUMNS = ("layer", "kind", "parameters", "health", "gradient", "update", "dead", "note")
_SIGNALS = (Signal.HEALTH, Signal.GRAD_NORM, Signal.UPDATE_RATIO, Signal.DEAD_FRACTION)
_LONGEST_CELL = 44


@dataclass(frozen=True, slots=True)
class Summary:
    """What is told of a run.

    Attributes:
        title: run, mode, step, where to look.
        rows: one for each shown layer, a cell for each of :data:`COLUMNS`.
        left_out: how many layers are not shown.
        sections: (title, lines); empty ones are not shown.
    """

    title: str
    rows: Sequence[Sequence[str]]
    left_out: int
    sections: Sequence[tuple[str, Sequence[str]]] = field(default=())

    def text(self) -> str:
        blocks = [self.title]
        if self.rows:
            blocks.append(
                "\n".join([*aligned([COLUMNS, *self.rows], right=range(2, 7)), *self._more()])
            )
        for title, lines in self._told():
            blocks.append("\n".join([title, *(f"  - {line}" for line in lines)]))
        return printable("\n\n".join(blocks))

    def html(self) -> str:
        parts = [f"<p><b>{'<br>'.join(map(html.escape, self.title.splitlines()))}</b></p>"]
        if self.rows:
            parts.append(html_table(COLUMNS, self.rows))
            parts.extend(f"<p>{html.escape(line)}</p>" for line in self._more())
        parts.extend(html_list(title, lines) for title, lines in self._told())
        return "".join(parts)

    def _more(self) -> list[str]:
        return [f"and {self.left_out:,} more"] if self.left_out else []

    def _told(self) -> list[tuple[str, list[str]]]:
        return [(title, shortened(lines)) for title, lines in self.sections if lines]


def summary_of(parts: Parts, frame: HealthFrame | None, why: Reasons, *, closed: bool) -> Summary:
    """Tell a run.

    Args:
        frame: the latest one, None before the first.
        why: why nothing happens.
        closed: the session has ended.
    """
    run, layers, changes = parts.run, parts.layers.all, parts.surgery.changes
    if not parts.layers.fixed:
        layers = tuple(replace(layer, reason="not seen to run yet") for layer in layers)
    rows, left_out = layer_rows(layers, frame, _grafts_by_layer(parts))
    where = parts.server.page if parts.server is not None else "local"
    measured = f"health of step {frame.step:,}" if frame is not None else "no health frame yet"
    proposed = parts.remedies.proposals if parts.remedies is not None else ()
    waiting = parts.local.waiting if parts.local is not None else ()
    return Summary(
        title=(
            f"Esper run {run.name!r}: {run.mode} mode, step {run.step:,}, {where}"
            f"{', closed' if closed else ''}\n{len(layers)} layers, {measured}"
        ),
        rows=rows,
        left_out=left_out,
        sections=(
            ("Findings", [str(finding) for finding in parts.findings.all()]),
            ("Adaptations", [str(entry) for entry in changes.adaptations]),
            ("Snapshots", [line] if (line := changes.snapshots()) else []),
            ("Remedies in effect", [str(receipt) for receipt in changes.remedies]),
            ("Proposed remedies", [str(entry) for entry in proposed]),
            ("Waiting for you", [str(entry) for entry in waiting]),
            (why.title, why.lines()),
        ),
    )


def _grafts_by_layer(parts: Parts) -> dict[str, str]:
    notes: dict[str, str] = {}
    for entry in parts.surgery.changes.grafted:
        before = f"{notes[entry.layer]}, " if entry.layer in notes else ""
        notes[entry.layer] = f"{before}{entry.blueprint} ({entry.state})"
    return notes


def shortened(lines: Sequence[str]) -> list[str]:
    """The first lines, and how many are left."""
    rest = len(lines) - MOST_ENTRIES
    return [*lines[:MOST_ENTRIES], *([f"and {rest} more"] if rest > 0 else [])]


def layer_rows(
    layers: Sequence[LayerInfo], frame: HealthFrame | None, notes: dict[str, str]
) -> tuple[list[tuple[str, ...]], int]:
    """The layers of the lowest health first, and how many are left out.

    Args:
        notes: layer -> what it holds, such as its grafts.
    """
    known = {name: row for row, name in enumerate(frame.layers)} if frame is not None else {}

    def values(layer: LayerInfo) -> list[float]:
        if frame is None or layer.name not in known:
            return [math.nan] * len(_SIGNALS)
        row = known[layer.name]
        return [float(frame.column(signal)[row]) for signal in _SIGNALS]

    health = np.array([values(layer)[0] for layer in layers], dtype=np.float64)
    # Unknown health comes last; equal ones stay in the model's order.
    order = np.argsort(np.where(np.isnan(health), np.inf, health), kind="stable")
    shown = [layers[int(place)] for place in order[:MOST_ROWS]]
    rows = [_row(layer, values(layer), notes.get(layer.name, "")) for layer in shown]
    return rows, len(layers) - len(rows)


def _row(layer: LayerInfo, values: Sequence[float], note: str) -> tuple[str, ...]:
    health, gradient, update, dead = values
    reason = "" if layer.graftable else layer.reason.rstrip(".") or "not graftable"
    return (
        cut(layer.name or "(the model)", _LONGEST_CELL),
        layer.kind,
        f"{layer.parameters:,}",
        _number(health, ".2f"),
        "-" if math.isnan(gradient) else amount(gradient),
        "-" if math.isnan(update) else amount(update),
        _number(dead, ".0%"),
        cut("; ".join(filter(None, (note, reason))), _LONGEST_CELL),
    )


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
