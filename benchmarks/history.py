"""The rows of an installation that has been used for long: runs, adaptations, telemetry, audit.

They are written straight into the tables, in large batches, and look like real ones: the pages read
them. Only what the database itself checks is true of them; the audit log's chain is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from django.db.models import Max, Model
from django.utils import timezone

from apps.accounts.models import User
from apps.adaptations.models import Adaptation, DecisionRecord
from apps.audit.models import AuditEvent
from apps.blueprints.models import Blueprint
from apps.policies.services import current_policy
from apps.runs.models import Run
from apps.telemetry.models import Frame, Metric
from apps.violations.models import Violation
from benchmarks.waiting import layer
from esper.contracts import (
    SIGNALS,
    AdaptationState,
    AdaptationType,
    Risk,
    RunMode,
    RunState,
    Severity,
    ViolationRule,
)

AT_ONCE = 2_000
DAYS = 200  # of history
LIVE_RUNS = 40  # at most; a machine has only so many
AUDIT_PER_ADAPTATION = 3
LAYERS = 12
LOSSES_OF_A_LIVE_RUN = 2_000
FRAMES_OF_A_LIVE_RUN = 100
_M = TypeVar("_M", bound=Model)

ENDS = (
    (AdaptationState.KEPT, 0.45),
    (AdaptationState.ROLLED_BACK, 0.25),
    (AdaptationState.REJECTED, 0.1),
    (AdaptationState.DECLINED, 0.1),
    (AdaptationState.EXPIRED, 0.1),
)


@dataclass(frozen=True)
class Size:
    """How much history there is."""

    runs: int
    adaptations: int


class History:
    """Grows in steps, so that the same pages are measured at each size.

    Args:
        telemetry: live runs have losses and frames.
    """

    def __init__(self, owner: User, *, telemetry: bool = True) -> None:
        self._owner = owner
        self._telemetry = telemetry
        self._rng = np.random.default_rng(0)
        self._layers = [layer(f"blocks.{index}").to_wire() for index in range(LAYERS)]
        self._blueprints = list(Blueprint.objects.order_by("id"))
        self._now = timezone.now()

    def grow_to(self, size: Size) -> None:
        """Adds what is missing; rows that exist stay."""
        begin = Run.objects.count()
        _write(Run, (self._run(number) for number in range(begin, size.runs)))
        runs = list(Run.objects.order_by("id").defer("layers")[begin : size.runs])
        count = max(0, size.adaptations - Adaptation.objects.count())
        _write(Adaptation, self._adaptations(runs, count))
        _write(DecisionRecord, _decisions())
        _write(Violation, self._violations(runs))
        _write(AuditEvent, self._audit(runs, count))
        for run in [run for run in runs if not run.ended and self._telemetry]:
            self.add_telemetry(run, LAYERS, LOSSES_OF_A_LIVE_RUN, FRAMES_OF_A_LIVE_RUN)

    def add_huge_run(self, layers: int) -> Run:
        """A live run of a model with so many layers, and a long history of its own."""
        run = self._run(10**6)
        run.name, run.state, run.ended_at = "huge", RunState.RUNNING, None
        run.layers = [layer(f"blocks.{index}.fc").to_wire() for index in range(layers)]
        run.layer_count = layers
        run.save()
        _write(Adaptation, self._adaptations([run], 200))
        _write(Violation, self._violations([run] * 10))
        self.add_telemetry(run, layers, 10_000, 200)
        return run

    def add_telemetry(self, run: Run, layers: int, losses: int, frames: int) -> None:
        """Losses of every step and frames between them, up to the run's present step."""
        first = run.step - losses
        values = 0.9 + 1.4 * 0.999 ** np.arange(losses) + 0.01 * self._rng.random(losses)
        for name, factor in (("loss", 1.0), ("lr", 1e-3), ("step_ms", 20.0)):
            _write(
                Metric,
                (
                    Metric(
                        run=run,
                        epoch=1,
                        step=first + index,
                        wall_time=1.7e9 + index,
                        name=name,
                        value=float(value) * factor,
                    )
                    for index, value in enumerate(values)
                ),
            )
        every = max(1, losses // frames)
        packed = self._rng.random((layers, len(SIGNALS)), dtype=np.float32).astype("<f4").tobytes()
        _write(
            Frame,
            (
                Frame(
                    run=run,
                    epoch=1,
                    step=first + index * every,
                    wall_time=1.7e9 + index,
                    values=packed,
                    loss=1.0,
                )
                for index in range(frames)
            ),
            at_once=100,
        )

    def _run(self, number: int) -> Run:
        live = number % 10 == 0 and number < LIVE_RUNS * 10
        return Run(
            name=f"train-{number}",
            owner=self._owner,
            mode=RunMode.AUTOMATIC,
            state=RunState.RUNNING if live else RunState.FINISHED,
            host=f"gpu-{number % 50}",
            capability="cpu",
            versions={"torch": "2.13.0", "python": "3.11"},
            layers=self._layers,
            layer_count=LAYERS,
            model_parameters=1_000_000,
            target_steps=100_000,
            step=20_000,
            last_loss=0.9,
            telemetry_seq=1000,
            last_seen_at=self._now,
            ended_at=None if live else self._now - timedelta(hours=number % 1000),
        )

    def _adaptations(self, runs: list[Run], count: int) -> Iterator[Adaptation]:
        policy = current_policy()
        words = [{"text": "the loss is flat", "weight": 0.3}] * 4
        checks = [{"rule": "memory", "passed": True, "observed": "1", "limit": "2"}] * 8
        states = self._rng.choice(len(ENDS), count, p=[share for _, share in ENDS])
        waiting = {run.pk for run in runs if not run.ended}
        for index in range(count):
            run = runs[index % len(runs)]
            state = ENDS[states[index]][0]
            if run.pk in waiting:  # the first one of each live run waits for a person
                waiting.discard(run.pk)
                state = AdaptationState.AWAITING_APPROVAL
            over = state != AdaptationState.AWAITING_APPROVAL
            measured = state in (AdaptationState.KEPT, AdaptationState.ROLLED_BACK)
            proposed = self._past(index, count)
            by_person = measured or state == AdaptationState.REJECTED
            yield Adaptation(
                run=run,
                run_epoch=1,
                created_at=proposed,
                changed_at=proposed,
                decided_by=self._owner if by_person else None,
                decided_at=proposed + timedelta(minutes=index % 90) if by_person else None,
                graft_step=2000 + index // len(runs) * 100 if measured else None,
                pause_ms=5.0 + index % 40 if measured else None,
                idempotency_key=f"{run.pk}:{index}:{count}",
                layer=f"blocks.{index % LAYERS}",
                adaptation_type=AdaptationType.ADD_EFFICIENCY,
                blueprint=self._blueprints[index % len(self._blueprints)],
                config={"rank": 8},
                risk=Risk.LOW,
                confidence=0.6,
                urgency=0.3,
                forecast_parameters=2048,
                forecast_memory_mib=0.1,
                forecast_latency_ms=0.1,
                policy="heuristic-1",
                safety_policy=policy,
                proposed_step=1000 + index // len(runs) * 100,
                evidence={"loss": 1.0, "grad_norm": 0.5, "weight_norm": 3.0, "health": 0.5},
                reasons=[],
                checks=[],
                why_not=[],
                asks=[],
                evidence_hash="0" * 64,
                state=state,
                deadline_at=None if over else self._now + timedelta(hours=8),
                ended_at=self._now if over and state != AdaptationState.KEPT else None,
                kept_at=self._now if state == AdaptationState.KEPT else None,
                reward=0.01 if measured else None,
                reward_terms={"gain": 0.01} if measured else None,
                ablation_gain=0.02 if measured else None,
                details={"words": words, "checks": checks},
            )

    def _past(self, index: int, count: int) -> datetime:
        """The moment of the row with this index: the last one is of now."""
        return self._now - timedelta(days=DAYS) * (count - 1 - index) / count

    def _violations(self, runs: list[Run]) -> Iterator[Violation]:
        for index, run in enumerate(runs):
            for number in range(5):
                yield Violation(
                    run=run,
                    layer=f"blocks.{number}",
                    step=1000 * number,
                    resolved_step=1000 * number + 500 if run.ended or number else None,
                    finding="vanishing_gradient",
                    rule=ViolationRule.DIAGNOSIS,
                    severity=(Severity.CAUTION, Severity.SERIOUS)[index % 2],
                    observed="1e-9",
                    limit="1e-7",
                    text="The gradient vanishes.",
                    action="told",
                )

    def _audit(self, runs: list[Run], count: int) -> Iterator[AuditEvent]:
        last = AuditEvent.objects.aggregate(last=Max("id"))["last"] or 0
        acts = ("adaptation.proposed", "adaptation.approved", "adaptation.kept")
        for index in range(count * AUDIT_PER_ADAPTATION):
            run = runs[index // AUDIT_PER_ADAPTATION % len(runs)]
            yield AuditEvent(
                id=last + 1 + index,
                at=self._past(index, count * AUDIT_PER_ADAPTATION),
                actor_kind="person",
                actor=("olga", "oscar", "ada")[index % 3],
                act=acts[index % 3],
                object_kind="adaptation",
                object_uid=f"adp_{index}",
                run_uid=run.uid,
                data={"from": "a", "to": "b"},
                previous_hash="0" * 64,
                hash="1" * 64,
            )


def _decisions() -> Iterator[DecisionRecord]:
    """Of the adaptations that have none, without the snapshots, which are read one by one."""
    chances = {"heuristic-1": 0.9, "bandit-1": 0.1}
    rows = Adaptation.objects.filter(decision=None).values_list("pk", "run", "layer")
    for adaptation, run, layer_name in list(rows):
        yield DecisionRecord(
            run_id=run,
            run_epoch=1,
            step=1000,
            layer=layer_name,
            adaptation_id=adaptation,
            message={"chances": chances},
        )


def _write(model: type[_M], rows: Iterable[Any], *, at_once: int = AT_ONCE) -> None:
    waiting = iter(rows)
    moments = [name for name in ("created_at", "changed_at") if hasattr(model, name)]
    fields: list[Any] = [model._meta.get_field(name) for name in moments]
    automatic = [(field, field.auto_now, field.auto_now_add) for field in fields]
    try:
        for field in fields if model is Adaptation else ():
            field.auto_now = field.auto_now_add = False  # rows of the past
        while batch := list(islice(waiting, at_once)):
            model._default_manager.bulk_create(batch)
    finally:
        for field, now, now_add in automatic:
            field.auto_now, field.auto_now_add = now, now_add
