"""The interface of policies."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from esper.contracts import AdaptationDecision, RunSnapshot
from esper.health import Features


@dataclass(frozen=True, slots=True)
class Proposals:
    """A policy's answer.

    Attributes:
        decisions: best first; empty means "do nothing".
        reasons: why other layers got no decision, a sentence each; not empty without decisions.
        arms: all that could have been drawn, each with its chance to be drawn first; empty: the
            order of the decisions is certain.
        nothing: the chance of "do nothing" to be drawn first.
    """

    decisions: tuple[AdaptationDecision, ...] = ()
    reasons: tuple[str, ...] = ()
    arms: tuple[tuple[AdaptationDecision, float], ...] = ()
    nothing: float = 0.0

    def __iter__(self) -> Iterator[AdaptationDecision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)


def chance_of(
    proposals: Proposals, chosen: AdaptationDecision, blocked: Collection[AdaptationDecision]
) -> float:
    """The chance that a policy makes ``chosen``, given what the gates do not allow.

    Draws without replacement: of those that are left, each is drawn first with its own share.

    Args:
        blocked: decisions that a gate does not allow.
    """
    closed, wanted = {_key(decision) for decision in blocked}, _key(chosen)
    if not proposals.arms:
        first = next((d for d in proposals if _key(d) not in closed), None)
        return float(first is not None and _key(first) == wanted)
    shares = {_key(decision): share for decision, share in proposals.arms}
    left = proposals.nothing + sum(share for key, share in shares.items() if key not in closed)
    return shares.get(wanted, 0.0) / left if left > 0.0 else 0.0


def _key(decision: AdaptationDecision) -> tuple[str, str, str]:
    return (decision.layer_name, str(decision.adaptation_type), decision.since)


class Policy(Protocol):
    """Pure: equal snapshots, features and generators give equal proposals."""

    @property
    def name(self) -> str:
        """Name and version, stored with a decision."""

    def propose(
        self, snapshot: RunSnapshot, features: Features, rng: np.random.Generator
    ) -> Proposals:
        """Decisions, best first. ``rng`` is the only source of randomness."""
