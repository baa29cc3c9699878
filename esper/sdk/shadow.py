"""Tries a graft in shadow while the run trains on: in slices, within a share of the time.

    begin(trial)  forks the run: one copy with the graft, one without
    on_step()     both copies train a little, where the trials so far took less than their share
    end           the held-out gain with its interval, or why there is none

See :mod:`esper.sdk.twin`. The run itself is not touched, but its steps wait for the slices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from esper.exceptions import ConfigurationError
from esper.fail_closed import is_the_scripts
from esper.grafting.snapshots.snapshot import bytes_of_state
from esper.sdk.surgery import Surgery
from esper.sdk.twin import Twin, TwinTraining

LONGEST_SLICE_SECONDS = 0.25  # of one step
NO_SHADOW = "this script has not said how a graft is tried on a copy: attach(shadow=Shadow(...))"

Ended = Callable[[Twin | None, str], None]


@dataclass(frozen=True, slots=True, eq=False)
class Shadow:
    """How a script lets grafts be tried on copies of its run.

    Attributes:
        batches: recorded ones, used in this order, again from the first where they are few.
        loss: the training loss of a model for a batch.
        evaluate: the held-out loss of a model, lower is better, always on the same data.
        share: of the training time that trials may take, above 0 and at most 1.

    Raises:
        ConfigurationError: there is no batch, or the share is out of its range.
    """

    batches: Sequence[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    evaluate: Callable[[nn.Module], float]
    share: float = 0.05

    def __post_init__(self) -> None:
        if not len(self.batches):
            raise ConfigurationError("a shadow needs at least one recorded batch")
        if not 0.0 < self.share <= 1.0:
            raise ConfigurationError(
                f"a shadow's share of the time is above 0 and at most 1, got {self.share}"
            )


@dataclass(frozen=True, slots=True)
class ShadowTrial:
    """A graft that is to be tried; ``steps`` of both copies, and ``seconds``, at most.

    ``factors``: of a variant, which is then tried instead of ``config``.
    """

    layer: str
    blueprint: str
    since: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    steps: int = 200
    seconds: float = 60.0
    factors: dict[str, float] = field(default_factory=dict)


class ShadowTrials:
    """At most one trial at a time.

    Args:
        most_bytes: that both copies may take together.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Any],
        surgery: Surgery,
        how: Shadow,
        *,
        most_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model, self._optimizers, self._surgery, self._how = model, optimizers, surgery, how
        self._most_bytes = most_bytes
        self._clock = clock
        self._training: TwinTraining | None = None
        self._ended: Ended = lambda *_: None
        self._seconds = 0.0
        self._began = 0.0

    @property
    def busy(self) -> bool:
        """A trial is under way."""
        return self._training is not None

    def begin(self, trial: ShadowTrial, ended: Ended) -> None:
        """Fork the run, at a step boundary.

        Args:
            ended: called once, with the result, or with None and the reason.

        Raises:
            ConfigurationError: another trial is under way, the copies are too large, or the run
                has several optimizers.
            The errors of a graft.
        """
        if self.busy:
            raise ConfigurationError("another graft is being tried in shadow")
        if len(self._optimizers) != 1:
            raise ConfigurationError("a trial in shadow needs a run with one optimizer")
        needed = 2 * bytes_of_state(self._model, self._optimizers)
        if needed > self._most_bytes:
            raise ConfigurationError(
                f"two copies of the run take {needed / 2**30:.2f} GiB; snapshot_memory allows "
                f"{self._most_bytes / 2**30:.2f}"
            )
        how = self._how
        self._began = self._clock()
        self._training = TwinTraining(
            self._model,
            self._optimizers[0],
            partial(
                self._surgery.graft_copy,
                trial.layer,
                trial.blueprint,
                trial.since,
                self._surgery.config_of(
                    trial.layer, trial.blueprint, trial.since, trial.config, trial.factors
                ),
            ),
            batches=how.batches,
            loss=how.loss,
            evaluate=how.evaluate,
            steps=trial.steps,
        )
        self._ended, self._seconds = ended, trial.seconds

    def on_step(self) -> None:
        """A slice, where the trial has taken less than its share of the time."""
        training = self._training
        if training is None:
            return
        due = self._how.share * (self._clock() - self._began) - training.seconds
        left = self._seconds - training.seconds
        try:
            if due > 0.0 and left > 0.0:
                training.advance(min(due, left, LONGEST_SLICE_SECONDS))
        except Exception as error:  # of the script's own loss or held-out loss
            if is_the_scripts(error):
                raise
            self._end(None, f"{type(error).__name__}: {error}")
            return
        if training.over or training.seconds >= self._seconds:
            self._end(training.result(), "")

    def stop(self, reason: str) -> None:
        """End the trial that is under way, if there is one, without a result."""
        if self.busy:
            self._end(None, reason)

    def _end(self, found: Twin | None, reason: str) -> None:
        self._training = None  # frees the copies
        ended, self._ended = self._ended, lambda *_: None
        ended(found, reason)
