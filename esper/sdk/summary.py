"""A run on one screen: as text for a terminal, as HTML for a notebook."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from esper.console import printable
from esper.contracts import HealthFrame, LayerInfo, Signal

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
            blocks.append("\n".join([*_aligned([COLUMNS, *self.rows]), *self._more()]))
        for title, lines in self._told():
            blocks.append("\n".join([title, *(f"  - {line}" for line in lines)]))
        return printable("\n\n".join(blocks))

    def html(self) -> str:
        parts = [f"<p><b>{html.escape(self.title).replace(chr(10), '<br>')}</b></p>"]
        if self.rows:
            parts.append(f"<table><thead>{_html_row(COLUMNS, 'th')}</thead><tbody>")
            parts.extend(_html_row(row, "td") for row in self.rows)
            parts.append("</tbody></table>")
            parts.extend(f"<p>{html.escape(line)}</p>" for line in self._more())
        for title, lines in self._told():
            items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
            parts.append(f"<p><b>{html.escape(title)}</b></p><ul>{items}</ul>")
        return "".join(parts)

    def _more(self) -> list[str]:
        return [f"and {self.left_out:,} more"] if self.left_out else []

    def _told(self) -> list[tuple[str, list[str]]]:
        return [(title, shortened(lines)) for title, lines in self.sections if lines]


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
        _cut(layer.name or "(the model)"),
        layer.kind,
        f"{layer.parameters:,}",
        _number(health, ".2f"),
        _number(gradient, ".1e"),
        _number(update, ".1e"),
        _number(dead, ".0%"),
        _cut("; ".join(filter(None, (note, reason)))),
    )


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _cut(text: str) -> str:
    """One line of at most so many signs."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_CELL else line[: _LONGEST_CELL - 3] + "..."


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Numbers to the right, words to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if 2 <= column <= 6 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _html_row(cells: Sequence[str], tag: str) -> str:
    inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"
