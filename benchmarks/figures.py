"""How a figure is summarised and shown: percentiles, budget, and the seed document's value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esper.contracts import codec


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit on one percentile; ``seed`` is the value of the seed document."""

    percentile: str  # "p50", "p95", "p99"
    limit: float | None  # None: measured for comparison, without a limit
    unit: str
    seed: str = "-"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured quantity. ``note`` says what was measured, or why it was not."""

    name: str
    budget: Budget
    samples: tuple[float, ...]
    note: str

    def to_wire(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "unit": self.budget.unit,
            "budget": self.budget.limit,
            "budget_percentile": self.budget.percentile,
            "seed": self.budget.seed,
            "n": len(self.samples),
            "note": self.note,
        }
        for percentile in ("p50", "p95", "p99"):
            row[percentile] = self._percentile(percentile)
        return row

    @property
    def within(self) -> bool | None:
        """Whether the budget holds; None without a measurement or a limit."""
        value, limit = self._percentile(self.budget.percentile), self.budget.limit
        return None if value is None or limit is None else value <= limit

    def _percentile(self, name: str) -> float | None:
        if not self.samples or (len(self.samples) == 1 and name != "p50"):
            return None  # one value has no percentiles
        return round(float(np.percentile(self.samples, float(name[1:]))), 4)


def show(figures: Sequence[Figure]) -> str:
    """A table for a terminal."""
    lines = [f"{'figure':<18}{'p50':>10}{'p95':>10}{'p99':>10}  {'budget':<20}{'seed':<14}what"]
    for figure in figures:
        row = figure.to_wire()
        values = "".join(
            f"{'-' if row[name] is None else format(row[name], '.3g'):>10}"
            for name in ("p50", "p95", "p99")
        )
        mark = {True: "ok", False: "OVER", None: "?"}[figure.within]
        limit = row["budget"]
        budget = f"{row['budget_percentile']} <= {limit:g} {row['unit']} {mark}" if limit else "-"
        lines.append(f"{figure.name:<18}{values}  {budget:<20}{row['seed']:<14}{figure.note}")
    return "\n".join(lines)


def write_json(figures: Sequence[Figure], path: Path) -> None:
    path.write_bytes(codec.encode({figure.name: figure.to_wire() for figure in figures}))
