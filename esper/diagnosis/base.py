"""What a rule of the diagnosis is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from esper.contracts import Severity, ViolationRule
from esper.diagnosis.observation import Observation


class RemedySlug(StrEnum):
    """What can answer a finding, cheapest and most reversible first."""

    TELL = "tell"
    SKIP_UPDATE = "skip_update"
    CLIP_LAYER = "clip_layer"
    SET_LR = "set_lr"
    HOLD_LR = "hold_lr"
    MATCH_UPDATES = "match_updates"
    REWIND = "rewind"
    THAW = "thaw"
    ADOPT = "adopt"
    RECYCLE = "recycle"
    REPAIR_SCALE = "repair_scale"
    WEIGHT_DECAY = "weight_decay"
    RESTORE_BEST = "restore_best"
    STOP_EARLY = "stop_early"
    ADAPTER = "adapter"
    SPAN = "span"
    BLOCK = "block"


@dataclass(frozen=True, slots=True)
class Threshold:
    """A limit of a rule.

    Attributes:
        name: what is limited.
        value: the limit.
        unit: of the value.
        source: who uses it, or how it was chosen.
    """

    name: str
    value: float
    unit: str
    source: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """Why a rule holds now.

    Attributes:
        observed: a sentence with the measured numbers.
        limit: what was expected.
        signal: the signal that was read.
        value: its number; NaN where the evidence is no number.
        began_at: the layer where it began; empty for the run as a whole, or unknown.
        since_step: the first step of which it is known; None: this one.
        severity: where it differs from the rule's.
        advice: what to do, where it differs from the rule's.
        certain: it needs no second check.
        may_pass: it has done no harm so far; the next steps show whether it is over.
        passes: nothing is to be done as long as this holds: it gets better by itself, or what
            decides about it was not seen yet.
        only_tell: no remedy answers it, though the rule has some.
    """

    observed: str
    limit: str
    signal: str = ""
    value: float = math.nan
    began_at: str = ""
    since_step: int | None = None
    severity: Severity | None = None
    advice: str = ""
    certain: bool = False
    may_pass: bool = False
    passes: bool = False
    only_tell: bool = False


@dataclass(slots=True)
class Memory:
    """What one rule keeps between two checks of one run.

    Attributes:
        is_open: its finding is open, so that it may apply a lower limit.
        notes: anything that the rule needs.
    """

    is_open: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


class Rule(ABC):
    """One kind of fault of a training run; one file in ``esper/diagnosis/rules`` each.

    Attributes:
        slug: the file's name.
        title: what is wrong, in a few words.
        symptom: one sentence for people: what is seen.
        thresholds: every limit, with its source.
        severity: of a finding, unless its evidence says otherwise.
        false_alarm: what it would look like if the rule were wrong.
        advice: what a person can do.
        remedies: what can answer it, in the order in which to try them.
        violation: the rule of the protocol under which it is reported.
        every_step: it is cheap and hard, so it is checked in each step; the others are checked at
            the steps of the plan.
        opens_after: so many checks in a row with evidence open a finding.
        closes_after: so many checks in a row without evidence resolve it.
        explained_by: while one of these is open, this rule's evidence is its consequence.
        by_ledger: the optimizer's ledger reports it, also between two checks.
    """

    slug: ClassVar[str]
    title: ClassVar[str]
    symptom: ClassVar[str]
    thresholds: ClassVar[tuple[Threshold, ...]] = ()
    severity: ClassVar[Severity]
    false_alarm: ClassVar[str]
    advice: ClassVar[str]
    remedies: ClassVar[tuple[RemedySlug, ...]] = (RemedySlug.TELL,)
    violation: ClassVar[ViolationRule] = ViolationRule.DIAGNOSIS
    every_step: ClassVar[bool] = False
    opens_after: ClassVar[int] = 1
    closes_after: ClassVar[int] = 3
    explained_by: ClassVar[frozenset[str]] = frozenset()
    by_ledger: ClassVar[bool] = False

    @abstractmethod
    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        """The evidence that the rule holds now; None where it does not.

        Raises:
            Unknown: what the rule needs was not measured, so nobody knows.
        """


def amount(value: float) -> str:
    """Two significant digits, as people write them: 0.73, 14, 31,000, 1.6e+12."""
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}" if value else "0"
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 else f"{rounded:g}"


def of_size(change: float) -> str:
    """How far an update moves weights, in words that follow "by"."""
    return f"{amount(change)} of their size" if change < 1 else f"{amount(change)} times their size"
