"""What the parts of a session share about their run."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from esper.contracts import RunMode, SafetyPolicy
from esper.sdk.transport import TransportQueues
from esper.sdk.transport.registration import Registration

LOSSES_KEPT = 4_000

LossPoint = tuple[int, float]  # (step, loss)


@dataclass(slots=True)
class RunState:
    """Name, mode and progress of the run, and what limits it.

    Attributes:
        own_policy: the safety policy that ``attach`` was given; it applies until a server answers.
        queues: to and from the server; None where this process talks to none.
        step: the optimizer steps that the session has counted.
        losses: the training loss of the latest steps, without those that were taken back.
        rewinds: how often the run went back to the state before a graft.
        held_out: newest held-out loss; NaN: unknown.
        idle_until: the next step in which something is due; see :mod:`esper.sdk.idle_steps`.
    """

    name: str
    mode: RunMode
    own_policy: SafetyPolicy
    queues: TransportQueues | None = None
    step: int = 0
    losses: deque[LossPoint] = field(default_factory=lambda: deque(maxlen=LOSSES_KEPT))
    rewinds: int = 0
    held_out: float = math.nan
    idle_until: int = 0

    def wake(self) -> None:
        """Something has changed, so the next step is not idle."""
        self.idle_until = 0

    def go_back(self, to_step: int) -> None:
        """The weights are those of an earlier step: later losses are no measure of the run."""
        while self.losses and self.losses[-1][0] > to_step:
            self.losses.pop()
        self.rewinds += 1

    @property
    def registration(self) -> Registration | None:
        """The server's answer; None in local mode and before the run is registered."""
        return self.queues.registration if self.queues is not None else None

    @property
    def policy(self) -> SafetyPolicy:
        """The safety policy in force."""
        return self.registration.policy if self.registration is not None else self.own_policy
