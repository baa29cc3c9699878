"""What the parts of a session share about their run."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from itertools import islice

from esper.contracts import RunMode, SafetyPolicy
from esper.sdk.transport import TransportQueues
from esper.sdk.transport.registration import Registration

LOSSES_KEPT = 4_000
FIRST_LOSSES = 20

LossPoint = tuple[int, float]  # (step, loss)


@dataclass(slots=True)
class RunState:
    """Name, mode and progress of the run, and what limits it.

    Attributes:
        own_policy: the safety policy that ``attach`` was given; it applies until a server answers.
        queues: to and from the server; None where this process talks to none.
        step: the optimizer steps that the session has counted.
        losses: the training loss of the latest steps, without those that a hard undo took back.
        beginning: the first finite losses that led to the present weights, as far as they are
            known: ``losses`` forgets them in a long run.
        given_up: (after step, up to step) of losses whose weights a remedy took back.
        other_data_since: the step from which on the data or the targets are known to be others than
            before; -1: they are not. other_data: how often they were found to be.
        rewinds: how often the run went back to earlier weights.
        held_out: newest held-out loss; NaN: unknown.
        idle_until: the next step in which something is due; see :mod:`esper.sdk.idle_steps`.
    """

    name: str
    mode: RunMode
    own_policy: SafetyPolicy
    queues: TransportQueues | None = None
    step: int = 0
    losses: deque[LossPoint] = field(default_factory=lambda: deque(maxlen=LOSSES_KEPT))
    beginning: list[LossPoint] = field(default_factory=list)
    given_up: list[tuple[int, int]] = field(default_factory=list)
    other_data_since: int = -1
    other_data: int = 0
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
        self.beginning = [point for point in self.beginning if point[0] <= to_step]
        self.given_up = [gap for gap in self.given_up if gap[1] <= to_step]
        self.rewinds += 1

    def give_up(self, back_to: int) -> None:
        """A remedy put in the weights of an earlier step, or a graft that was applied then is out
        of the model: what came since does not measure the run, and stays on record."""
        self.given_up = [gap for gap in self.given_up if gap[0] < back_to]
        self.given_up.append((back_to, self.step))
        self.rewinds += 1

    def begin_anew(self, after_step: int) -> None:
        """The script put other weights in after this step; earlier losses do not measure them."""
        self.given_up = [(0, after_step)]
        self.rewinds += 1

    def take_back(self, to_step: int) -> None:
        """A hard undo put in the weights of this step, and what was given up then is theirs."""
        kept = [gap for gap in self.given_up if gap[1] < to_step]
        self.given_up = [*kept, (to_step, self.step)]
        self.rewinds += 1

    def led_to_its_weights(self, step: int) -> bool:
        """The run's present weights came out of this step."""
        return not any(before < step <= last for before, last in self.given_up)

    def losses_of_its_weights(self, newest: int = LOSSES_KEPT) -> list[LossPoint]:
        """Those of the newest losses that led to the present weights."""
        kept = list(self.losses)[-newest:]
        if not self.given_up:  # of nearly all runs; thousands of losses are asked for at a time
            return kept
        return [point for point in kept if self.led_to_its_weights(point[0])]

    def first_losses(self) -> list[float]:
        """The first finite losses that led to the present weights, at most ``FIRST_LOSSES``."""
        known = [point for point in self.beginning if self.led_to_its_weights(point[0])]
        after = known[-1][0] if known else -1
        if len(known) < FIRST_LOSSES:
            later = (
                (step, loss)
                for step, loss in self.losses
                if step > after and math.isfinite(loss) and self.led_to_its_weights(step)
            )
            known += islice(later, FIRST_LOSSES - len(known))
            self.beginning = known
        return [loss for _, loss in known]

    @property
    def registration(self) -> Registration | None:
        """The server's answer; None in local mode and before the run is registered."""
        return self.queues.registration if self.queues is not None else None

    @property
    def policy(self) -> SafetyPolicy:
        """The safety policy in force."""
        return self.registration.policy if self.registration is not None else self.own_policy
