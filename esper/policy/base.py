"""The interface of policies."""

from __future__ import annotations

from collections.abc import Iterator
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
    """

    decisions: tuple[AdaptationDecision, ...] = ()
    reasons: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[AdaptationDecision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)


class Policy(Protocol):
    """Pure: equal snapshots, features and generators give equal proposals."""

    @property
    def name(self) -> str:
        """Name and version, stored with a decision."""

    def propose(
        self, snapshot: RunSnapshot, features: Features, rng: np.random.Generator
    ) -> Proposals:
        """Decisions, best first. ``rng`` is the only source of randomness."""
