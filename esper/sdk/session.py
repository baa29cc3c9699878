"""A run's session: what a training loop calls once per step, looks at, saves and ends.

What a step does is in :mod:`esper.sdk.stepping`, what changes the model in :mod:`esper.sdk.acts`.
"""

from __future__ import annotations

import atexit
import gc
import logging
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Literal

from torch import Tensor

from esper import grafting
from esper.contracts import Finding, HealthFrame, LayerInfo
from esper.fail_closed import is_the_scripts
from esper.grafting import RemedyReceipt
from esper.sdk.acts import Acts
from esper.sdk.adaptation import Adaptation
from esper.sdk.copied_session import CopiedSession
from esper.sdk.ending import RunStopped, patience_for, reason_of
from esper.sdk.explaining import Reasons
from esper.sdk.local import Waiting
from esper.sdk.parts import Parts, Setup
from esper.sdk.session_state import load_state, state_of
from esper.sdk.summary import Summary, summary_of
from esper.sdk.treatments import RemedyProposal

logger = logging.getLogger("esper")

LARGE_PARAMETERS = 2_000_000  # of the model; a full collection takes some 0.1 s


class Session(Acts):
    """One attached run; made by :func:`esper.attach`. Use it in the training thread only."""

    def __init__(self, setup: Setup) -> None:
        parts = Parts(setup)
        super().__init__(parts)
        self._at_exit = _close_at_exit(self, reports=parts.queues is not None)
        self._leftovers = _Leftovers(self._steps.model_parameters)  # the last attribute goes last
        parts.announcer.attached(
            layers=len(parts.layers.own), slots=len(setup.slots), server=setup.server
        )

    # -- what a training loop calls ------------------------------------------------------------

    def step(self, loss: float | Tensor | None = None) -> None:
        """Call once per training step, before or after ``zero_grad()``.

        Args:
            loss: this step's training loss, a number or a tensor of one element. Without it the
                loss of this step is unknown: the guard cannot see it diverge. A loss on a GPU is
                read one step later, so that nothing waits for the GPU; the guard, too, sees it
                one step later.

        Raises:
            RunStopped: a person stopped the run.
            TypeError: ``loss`` is neither.
            ReplicaError: the ranks do not call the same in the same order.
            RuntimeError: torch's own, when another rank has ended.
        """
        self._steps.take(loss)

    def report(self, **metrics: float) -> None:
        """More numbers for this step, such as ``accuracy=0.93``; sent with the next ``step``.

        Raises:
            TypeError: a value is not a number.
        """
        for name, value in metrics.items():
            if isinstance(value, str | bool | bytes):
                raise TypeError(f"{name} must be a number, got {value!r}")
            self._steps.reported[name] = float(value)

    def detach(self) -> None:
        """Take everything out of the model and its optimizers that holds no graft.

        Hooks and empty slots go, so that ``torch.jit.script``, ``torch.export``, quantisation and
        pickle see the model as it was. Nothing is measured any more: no health frames, and in
        automatic mode no decisions. The other methods work on; :meth:`graft` makes a slot again.
        """
        parts, surgery = self._parts, self._parts.surgery
        self._steps.catch_up()
        parts.run.wake()
        self._steps.detached = True
        for end in self._measuring():
            end()
        surgery.sampler = None
        for model in (parts.setup.model, *surgery.copies):
            grafting.remove_slots(model)
        surgery.copies.close()
        parts.loads.close()

    def close(
        self,
        *,
        reason: str = "",
        failed: bool = False,
        timeout: float = 10.0,
        detach: bool = True,
    ) -> None:
        """End the run. Grafts stay in the model.

        Args:
            timeout: how many seconds to wait, at most, for the server to answer what is left.
            detach: take out all that holds no graft, as :meth:`detach` does. Otherwise empty slots
                stay, and code that torch has compiled with them can be used by a later session.
        """
        if self._steps.closed:
            return
        parts = self._parts
        self._steps.catch_up()
        parts.run.wake()
        self._steps.closed = True
        atexit.unregister(self._at_exit)
        ends = self._measuring()
        if detach:
            ends.append(self.detach)
        if parts.server is not None:
            state: Literal["failed", "finished"] = "failed" if failed else "finished"
            ends.append(partial(parts.server.close, state=state, reason=reason, timeout=timeout))
        ends.append(parts.announcer.close)
        for place, end in enumerate(ends):
            parts.fail_closed.run(
                end,
                part=f"end of the run ({place + 1} of {len(ends)})",
                unmeasured="A hook may stay in the model, or the end of the run is not reported.",
            )

    def _measuring(self) -> list[Callable[[], object]]:
        """What ends the parts that measure or propose. Remedies and grafts stay in force."""
        parts, surgery = self._parts, self._parts.surgery
        ends: list[Callable[[], object]] = [
            parts.layers.stop,
            parts.ahead.close,
            parts.ledger.close,
        ]
        if parts.local is not None:
            ends.append(parts.local.settle_rewards)
        closed = (surgery.sampler, parts.diagnosis, parts.remedies, surgery.states)
        return [*ends, *(part.close for part in closed if part is not None)]

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stopped = error is None or isinstance(error, RunStopped)
        self.close(reason=reason_of(error), failed=not stopped, timeout=patience_for(error))

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles of what keeps the session: see :class:`CopiedSession`."""
        return CopiedSession, (self._parts.run.name,)

    def say_attached_twice(self, older: Session) -> None:
        """The model had an open session, which was detached."""
        self._parts.announcer.attached_twice(older._parts.run.name)

    # -- looking -------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """The run has ended."""
        return self._steps.closed

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """The model's layers; shapes are known after the first forward pass.

        On several ranks the last one, with an empty name, is the model that they share.
        """
        return self._parts.layers.all

    @property
    def adaptations(self) -> tuple[Adaptation, ...]:
        """Everything that was grafted in this session, oldest first."""
        self._parts.failures.contain("surgery", self._parts.surgery.removals.notice_gone)
        return tuple(self._parts.surgery.changes.adaptations)

    @property
    def remedies(self) -> tuple[RemedyReceipt, ...]:
        """Remedies that are in effect, oldest first."""
        return tuple(self._parts.surgery.changes.remedies)

    @property
    def waiting(self) -> tuple[Waiting, ...]:
        """Local mode: decisions that a person must take; see :meth:`approve`."""
        return self._parts.local.waiting if self._parts.local is not None else ()

    @property
    def sampling(self) -> tuple[tuple[int, int, int], ...]:
        """Which steps were measured: (since step, steps between frames, between activations).

        ``esper.attach(…, sampling=session.sampling)`` makes another run measure at the same steps.
        """
        return tuple((p.since, p.frame, p.deep) for p in self._parts.sampling.recorded)

    @property
    def evaluate_every(self) -> tuple[tuple[int, int], ...]:
        """At which steps ``evaluate`` was called: (since step, steps between two calls).

        ``esper.attach(…, evaluate_every=session.evaluate_every)`` makes another run call it at the
        same steps.
        """
        return self._parts.evaluations.pace.recorded

    @property
    def proposed_remedies(self) -> tuple[RemedyProposal, ...]:
        """Remedies for open findings: they wait for :meth:`approve`, or say what Esper would do."""
        return tuple(self._parts.remedies.proposals) if self._parts.remedies is not None else ()

    @property
    def should_stop(self) -> bool:
        """The remedy ``stop_early`` asks the loop to stop.

        Esper's callbacks for Lightning and transformers obey. A loop of its own looks itself:
        ``if session.should_stop: break``.
        """
        return self._parts.surgery.stop.asked

    @property
    def run(self) -> str:
        """The run's id at the server; empty in local mode, and until it has registered."""
        registration = self._parts.run.registration
        return registration.run if registration is not None else ""

    @property
    def telemetry(self) -> dict[str, int]:
        """Items offered, stored by the server, dropped, waiting."""
        self._steps.catch_up()
        if self._parts.queues is None:
            return {"offered": 0, "stored": 0, "dropped": 0, "waiting": 0}
        return self._parts.queues.telemetry.counts()

    def frame(self) -> HealthFrame | None:
        """The latest health frame, None before the first."""
        return self._steps.latest_frame

    def findings(self, *, resolved: bool = False) -> list[Finding]:
        """What is wrong with the run: its diagnosis, the ledger, Esper's own failures.

        Args:
            resolved: the findings that are over, instead of those that are open.
        """
        if resolved:
            return self._parts.findings.resolved
        if not self._steps.closed:
            self._parts.failures.contain("ledger", self._parts.ledger.audit)
            self._parts.failures.contain("surgery", self._parts.surgery.settle_snapshots)
        return self._parts.findings.all()

    def why(self, layer: str | None = None) -> Reasons:
        """Why nothing happens: in the run, or at one layer. Prints as a list of sentences.

        In observe mode it also says what a supervised run would be asked.

        Raises:
            UnknownLayerError: the model has no layer of that name.
        """
        if layer is not None:
            return self._parts.explainer.of_layer(layer, self._steps.latest_frame)
        return self._parts.explainer.of_run(self._steps.latest_frame, closed=self._steps.closed)

    def __str__(self) -> str:
        return self._told(lambda: self._summary().text())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self._told(lambda: self._summary().html())

    def _summary(self) -> Summary:
        self.findings()  # the ledger's are of now
        return summary_of(
            self._parts, self._steps.latest_frame, self.why(), closed=self._steps.closed
        )

    def _told(self, tell: Callable[[], str]) -> str:
        """A debugger or a log line that shows a session must not raise."""
        run = self._parts.run
        try:
            return tell()
        except Exception as error:
            if is_the_scripts(error):
                raise
            logger.debug("the summary failed", exc_info=error)
            return f"<esper.Session {run.name!r}, step {run.step}: {error}>"

    # -- saving --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the model and the optimizer.

        Load it first: it rebuilds the grafts, so that the model's and the optimizer's own states
        fit again. It also holds the grafts' weights and all optimizer state by parameter name.
        """
        self._steps.catch_up()
        return state_of(self._parts)

    def load_state_dict(self, state: Any) -> None:
        """Rebuild the grafts of a checkpoint and load their weights and optimizer state.

        Call it after ``attach`` and before the first ``step``. All of it is taken or nothing: when
        it raises, model, optimizer and session are as before. On several ranks each of them must
        call it, and it is taken on all of them or on none.

        Raises:
            ConfigurationError: it is no such state, it is of another model, or training has begun.
            ReplicaError: another rank could not take it, or was given another one.
        """
        load_state(self._parts, state)


class _Leftovers:
    """Frees what is left of a large run, once its session is gone.

    The parts of a session refer to one another, so they would keep the model, its optimizer and its
    good states until Python's next full collection. A script that trains one model after another
    would run out of memory, on a GPU before the collector has seen a reason to run.
    """

    def __init__(self, parameters: int) -> None:
        self._is_large = parameters >= LARGE_PARAMETERS

    def __del__(self) -> None:
        if self._is_large and not sys.is_finalizing():
            gc.collect()


def _close_at_exit(session: Session, *, reports: bool) -> Callable[[], None]:
    """Ends the run when the script did not.

    Args:
        reports: the session talks to a server, so it stays until it has reported its end. Any
            other one is not kept in memory, and its model neither.

    Returns:
        What was registered with ``atexit``.
    """
    find: Callable[[], Session | None] = (lambda: session) if reports else weakref.ref(session)

    def close() -> None:
        found = find()
        if found is not None:
            with suppress(Exception):
                error = getattr(sys, "last_value", None)
                found.close(
                    reason=reason_of(error),
                    failed=error is not None,
                    timeout=patience_for(error, 3.0),
                )

    atexit.register(close)
    return close
