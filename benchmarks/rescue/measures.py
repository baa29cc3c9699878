"""From what the arms did with each case to the figures of the report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.rescue.cases import Case
from benchmarks.rescue.training import Outcome

POINTS = 0.02  # of the held-out score
RESAMPLED = 2000
NOT_LEARNED = "the twin did not learn"


@dataclass
class Record:
    """One case with all its arms.

    Attributes:
        twin: held-out score of the healthy twin within its own steps.
        clean_steps: of the twin; 0 where an earlier case has the same twin.
        hurts: left alone, the run with the fault ends more than two points below its twin.
        alarms: slug -> step, what was found in the twin.
        arms: name -> what became of it.
        counts: the twin is healthy, and the fault hurts or is one by definition.
    """

    tier: str
    kind: str
    name: str
    seed: int
    steps: int
    rules: list[str]
    labels: list[str]
    bug: bool
    begins: int
    twin: float
    twin_cpu_s: float = math.nan
    hurts: bool = False
    clean_steps: int = 0
    alarms: dict[str, int] = field(default_factory=dict)
    arms: dict[str, Outcome] = field(default_factory=dict)
    counts: bool = False
    why_not: str = ""

    @classmethod
    def of(cls, case: Case, watched: Outcome) -> Record:
        return cls(
            case.tier, case.kind, case.name, case.seed, case.steps, sorted(case.rules),
            sorted(case.labels), case.bug, case.begins, watched.score,
            clean_steps=watched.steps, alarms=watched.found,
        )  # fmt: skip

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Record:
        arms = {name: Outcome(**outcome) for name, outcome in saved.pop("arms").items()}
        return cls(**saved, arms=arms)

    @property
    def title(self) -> str:
        return f"{self.kind}, {self.name}, seed {self.seed}"

    # -- detection, in the run that is only observed ---------------------------------------------

    @property
    def seen(self) -> Outcome:
        return self.arms["observe"]

    @property
    def told_at(self) -> int | None:
        return min(self.seen.found.values(), default=None)

    @property
    def fitting(self) -> dict[str, int]:
        return {slug: step for slug, step in self.seen.found.items() if self.fits(slug)}

    @property
    def named_at(self) -> int | None:
        return min(self.fitting.values(), default=None)

    @property
    def ranked(self) -> list[str]:
        """What was found, as a person reads it: the worst first, then the earliest."""
        weight = {"critical": 0, "serious": 1, "caution": 2}
        found = self.seen.found
        return sorted(found, key=lambda s: (weight.get(self.seen.severe.get(s, ""), 3), found[s]))

    def fits(self, slug: str) -> bool:
        return slug in self.rules or bool(LABELS.get(slug, frozenset()) & set(self.labels))

    # -- recovery --------------------------------------------------------------------------------

    def repaired(self, arm: str) -> bool:
        return self.arms[arm].score >= self.twin - POINTS

    def worse(self, arm: str) -> bool:
        """Worse than the same run left alone."""
        alone, score = self.seen.score, self.arms[arm].score
        return (score < alone - POINTS) or (math.isnan(score) and not math.isnan(alone))

    def step_ratio(self, arm: str) -> float:
        """Steps until the score was good enough / steps of the twin; NaN: it never was."""
        outcome = self.arms[arm]
        if arm == "restart":
            return outcome.steps / self.steps if self.repaired(arm) else math.nan
        first = outcome.first_at(self.twin - POINTS)
        return math.nan if first is None else first / self.steps


# What a rule says about the cause, in the words of the collection of Stack Overflow's questions.
LABELS: dict[str, frozenset[str]] = {
    "abnormal_data": frozenset({"preprocessing"}),
    "bad_initialisation": frozenset({"init"}),
    "dying_relu": frozenset({"activation", "init", "rate"}),
    "exploding_gradient": frozenset({"init", "preprocessing", "rate"}),
    "loss_spike": frozenset({"rate"}),
    "memorised_noise": frozenset({"preprocessing"}),
    "no_activation": frozenset({"activation", "layers"}),
    "non_finite": frozenset({"rate"}),
    "oscillating_loss": frozenset({"rate", "batch"}),
    "over_fitting": frozenset({"epochs", "regularisation"}),
    "plateau": frozenset({"layers"}),
    "repeated_initialisation": frozenset({"init"}),
    "saturation": frozenset({"activation", "init", "preprocessing"}),
    "slow_convergence": frozenset({"rate", "epochs", "optimizer"}),
    "update_ratio_high": frozenset({"rate"}),
    "update_ratio_low": frozenset({"rate", "epochs"}),
    "vanishing_gradient": frozenset({"activation", "init", "layers"}),
    "wrong_loss": frozenset({"loss"}),
    "wrong_output_activation": frozenset({"activation"}),
    "nothing_moves": frozenset({"rate", "optimizer"}),
    "not_held": frozenset({"optimizer"}),
    "gradients_not_zeroed": frozenset({"optimizer"}),
    "frozen_part": frozenset({"layers"}),
    "unreached": frozenset({"layers"}),
    "training_in_eval_mode": frozenset({"layers"}),
    "weight_decay_high": frozenset({"regularisation"}),
    "dropout_high": frozenset({"regularisation"}),
    "momentum_high": frozenset({"optimizer"}),
    "few_in_batch_norm": frozenset({"batch"}),
    "sorted_data": frozenset({"preprocessing"}),
    "frozen_at_random": frozenset({"layers"}),
    "betas_swapped": frozenset({"optimizer"}),
    "group_without_rate": frozenset({"rate", "optimizer"}),
    "gradient_below_eps": frozenset({"loss", "optimizer"}),
    "clipped_to_nothing": frozenset({"optimizer"}),
    "softmax_over_batch": frozenset({"activation"}),
    "targets_far": frozenset({"preprocessing"}),
    "targets_shifted": frozenset({"preprocessing"}),
    "accumulation_cleared": frozenset({"optimizer"}),
    "imbalanced_classes": frozenset({"preprocessing"}),
    "penalty_outweighs": frozenset({"loss", "regularisation"}),
    "posterior_collapse": frozenset({"loss"}),
    "sees_ahead": frozenset({"layers"}),
    "single_unit": frozenset({"layers"}),
    "classes_on_other_axis": frozenset({"activation", "loss"}),
    "mask_inverted": frozenset({"preprocessing"}),
    "norm_without_statistics": frozenset({"layers"}),
}


@dataclass(frozen=True)
class Share:
    """A share of cases, with a 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if not self.n:
            return "-"
        return f"{self.value:.0%} ({self.low:.0%} to {self.high:.0%})"


def share(values: Iterable[float]) -> Share:
    """Mean of numbers, one for each case, and the interval of that mean."""
    found = np.array(list(values), dtype=np.float64)
    if not len(found):
        return Share(math.nan, math.nan, math.nan, 0)
    drawn = np.random.default_rng(0).integers(0, len(found), (RESAMPLED, len(found)))
    low, high = np.percentile(found[drawn].mean(1), [2.5, 97.5])
    return Share(float(found.mean()), float(low), float(high), len(found))


def share_of(records: Sequence[Record], holds: Callable[[Record], bool]) -> Share:
    return share(float(holds(record)) for record in records)


def median_of(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return statistics.median(known) if known else math.nan


@dataclass(frozen=True)
class Detection:
    """What was told about some cases."""

    told: Share
    named: Share
    top1: Share
    top3: Share
    precision: float
    steps: float

    @classmethod
    def of(cls, records: Sequence[Record]) -> Detection:
        fitting = sum(len(record.fitting) for record in records)
        findings = sum(len(record.seen.found) for record in records)
        return cls(
            share_of(records, lambda r: r.told_at is not None),
            share_of(records, lambda r: r.named_at is not None),
            share_of(records, lambda r: any(map(r.fits, r.ranked[:1]))),
            share_of(records, lambda r: any(map(r.fits, r.ranked[:3]))),
            fitting / findings if findings else math.nan,
            median_of(record.told_at for record in records),
        )


@dataclass(frozen=True)
class Recovery:
    """What one arm did with some cases."""

    arm: str
    repaired: Share
    worse: int
    steps: float
    cpu: float
    remedies: float
    decisions: float

    @classmethod
    def of(cls, records: Sequence[Record], arm: str) -> Recovery:
        own = [record for record in records if arm in record.arms]
        outcomes = [record.arms[arm] for record in own]
        return cls(
            arm,
            share_of(own, lambda r: r.repaired(arm)),
            sum(record.worse(arm) for record in own),
            median_of(record.step_ratio(arm) for record in own),
            median_of(r.arms[arm].cpu_s / r.twin_cpu_s for r in own if r.twin_cpu_s > 0),
            statistics.fmean(len(o.remedies) for o in outcomes) if outcomes else math.nan,
            statistics.fmean(o.decisions for o in outcomes) if outcomes else math.nan,
        )


def alarms_in_10_000(records: Sequence[Record]) -> tuple[int, int]:
    """Findings above info, and steps, of all healthy runs."""
    return sum(len(record.alarms) for record in records), sum(
        record.clean_steps for record in records
    )
