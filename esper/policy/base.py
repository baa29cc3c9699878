"""What every policy is."""

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
        reasons: what was looked at and left alone, a sentence each; never empty with no decisions.
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
        """With its version, as it is stored with a decision."""

    def propose(
        self, snapshot: RunSnapshot, features: Features, rng: np.random.Generator
    ) -> Proposals:
        """Decisions, best first. ``rng`` is the only source of chance."""
