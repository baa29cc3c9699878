"""Cases from which confidence is computed: adaptations of known outcome, one a row.

The library brings a table, ``cases.csv``, made by ``python -m benchmarks.confidence``.

    seed, host    of the training; cases of one host share its data; of a remedy, the host is the
                  kind of fault that the training was given
    kind          graft or remedy
    choice        slug of the blueprint or remedy
    layer         class name of the layer; "run" for a remedy of the whole run
    finding       slug of the finding that it answers; empty where there was none
    gain, error   of the held-out loss against a twin, a share, and its standard error; NaN: none
    success       a graft: the gain is above 0.5 %; a remedy: its symptom went and stayed away
    the others    :data:`MEASURED`, at the time of the decision; NaN: unknown
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

MEASURED: Mapping[str, str] = {
    "loss_exponent": "how fast the loss falls",
    "loss_noise": "noise of the loss",
    "headroom": "loss now / first loss",
    "held_out_gap": "held-out loss / training loss",
    "stable_rank": "stable rank of the layer",
    "grad_share": "gradient of the layer / median",
    "update_ratio": "update / weight",
    "dead_fraction": "dead units",
    "saturation": "saturated units",
    "grad_snr": "signal to noise of the gradient",
    "added": "added parameters / the model's",
}
_FIXED = ("seed", "host", "kind", "choice", "layer", "finding", "gain", "error", "success")


@dataclass(frozen=True, slots=True)
class Case:
    """One adaptation of known outcome; see the module for the members."""

    seed: int
    host: str
    kind: Literal["graft", "remedy"]
    choice: str
    layer: str
    finding: str
    gain: float
    error: float
    success: bool
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def training(self) -> str:
        """Cases with the same one share their data."""
        return f"{self.kind} {self.host} {self.seed}"


def measured(
    evidence: Mapping[str, float], added_parameters: int, model_parameters: int
) -> dict[str, float]:
    """The numbers of a decision that may tell how it will end, without units.

    Args:
        evidence: as :func:`esper.pipeline.evidence` makes it and the server stores it.
    """
    level = evidence.get("loss", math.nan)
    found = {
        "loss_exponent": evidence.get("loss_exponent", math.nan),
        "loss_noise": _ratio(evidence.get("loss_noise", math.nan), level),
        "headroom": _ratio(level, evidence.get("loss_initial", math.nan)),
        "held_out_gap": _log(_ratio(evidence.get("loss_held_out", math.nan), level)),
        "stable_rank": evidence.get("stable_rank", math.nan),
        "grad_share": _log(
            _ratio(evidence.get("grad_norm", math.nan), evidence.get("grad_norm_median", math.nan))
        ),
        "update_ratio": _log(evidence.get("update_ratio", math.nan)),
        "dead_fraction": evidence.get("dead_fraction", math.nan),
        "saturation": evidence.get("saturation", math.nan),
        "grad_snr": evidence.get("grad_snr", math.nan),
        "added": _log(_ratio(added_parameters, model_parameters)),
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _ratio(one: float, other: float) -> float:
    return one / abs(other) if other and math.isfinite(other) else math.nan


def _log(value: float) -> float:
    """log10; NaN for what is not above zero."""
    return math.log10(value) if value > 0 else math.nan


@cache
def shipped() -> tuple[Case, ...]:
    """The table that the library brings."""
    text = resources.files("esper.policy").joinpath("cases.csv").read_text("utf-8")
    return tuple(_case(row) for row in csv.DictReader(text.splitlines()))


def read(path: Path) -> list[Case]:
    """Cases of a file; a file that is not there has none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [_case(row) for row in csv.DictReader(file)]


def write(path: Path, cases: Iterable[Case]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*_FIXED, *MEASURED))
        for case in cases:
            fixed = [getattr(case, name) for name in _FIXED[:6]]
            numbers = [_text(case.gain), _text(case.error), int(case.success)]
            writer.writerow(
                (*fixed, *numbers, *(_text(case.measured.get(name, math.nan)) for name in MEASURED))
            )


def _text(value: float) -> str:
    return f"{value:.5g}" if math.isfinite(value) else ""


def _case(row: Mapping[str, str]) -> Case:
    return Case(
        seed=int(row["seed"]),
        host=row["host"],
        kind="remedy" if row["kind"] == "remedy" else "graft",
        choice=row["choice"],
        layer=row["layer"],
        finding=row["finding"],
        gain=float(row["gain"] or "nan"),
        error=float(row["error"] or "nan"),
        success=row["success"] == "1",
        measured={name: float(row[name]) for name in MEASURED if row.get(name)},
    )
