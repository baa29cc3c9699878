"""The life of an adaptation: a run with its people, and the parts of worker and trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgspec
from django.utils import timezone

from apps.accounts.models import User
from apps.adaptations import services
from apps.adaptations.compile_jobs import queue_dispatch
from apps.adaptations.lifecycle import transition
from apps.adaptations.models import Adaptation
from apps.blueprints.models import Blueprint
from apps.runs.models import Command, Run
from apps.trainers import services as trainers
from apps.workers import services as workers
from esper.contracts import (
    AdaptationState,
    AdaptationType,
    CommandAck,
    CommandState,
    CostForecast,
    Risk,
)
from esper.contracts.protocol import Proposal
from tests.apps.cast import (
    CERTIFICATE,
    TAMIYO,
    TRAINER,
    WORKER,
    make_blueprint,
    make_kernel,
    make_person,
    make_run,
)

NAN = math.nan


@dataclass
class Stage:
    """A run with its people; the methods play the parts of worker and trainer."""

    run: Run
    operator: User
    second: User
    owner: User
    viewer: User
    blueprint: Blueprint

    def proposal(self, **changes: Any) -> Proposal:
        base = Proposal(
            epoch=self.run.epoch,
            step=self.run.step,
            layer="fc",
            adaptation_type=AdaptationType.ADD_EFFICIENCY,
            confidence=0.9,
            urgency=0.3,
            blueprint=self.blueprint.slug,
            config={"rank": 4},
            risk=Risk.LOW,
            forecast=CostForecast(2048, 4096, 0.1, 0.1),
            reasons=(),
            checks=(),
            why_not=(),
            asks=(),
            evidence={"loss": 1.0, "grad_norm": 0.5, "weight_norm": 3.0, "health": 0.5},
            policy="heuristic-1",
        )
        return msgspec.structs.replace(base, **changes)

    def propose(self, **changes: Any) -> Adaptation:
        proposal = self.proposal(**changes)
        key = f"{self.run.uid}:{proposal.epoch}:{proposal.step}:{proposal.layer}"
        return services.propose_adaptation(
            run=self.run, proposal=proposal, idempotency_key=key, actor=TAMIYO
        )

    def waiting(self, **changes: Any) -> Adaptation:
        return self.propose(confidence=0.6, **changes)

    def compiled(self, adaptation: Adaptation) -> Adaptation:
        """Plays the compile worker without torch."""
        adaptation.refresh_from_db()
        job = adaptation.job
        assert job is not None
        assert workers.claim_job(job, worker="compile@here")
        transition(adaptation, AdaptationState.COMPILING, actor=WORKER)
        assert workers.finish_job(
            job, kernel_digest=make_kernel().digest, cached=False, build_ms=20.0
        )
        transition(adaptation, AdaptationState.COMPILED, actor=WORKER, kernel=make_kernel())
        queue_dispatch(adaptation)
        return adaptation

    def dispatched(self, adaptation: Adaptation) -> Command:
        services.dispatch_adaptation(self.compiled(adaptation).uid, worker="compile@here")
        return self.command(adaptation)

    def command(self, adaptation: Adaptation) -> Command:
        return Command.objects.filter(adaptation_uid=adaptation.uid).latest("seq")

    def ack(self, command: Command, state: CommandState, **changes: Any) -> None:
        ack = CommandAck(seq=command.seq, state=state, **changes)
        self.run.refresh_from_db()
        trainers.acknowledge_command(run=self.run, epoch=self.run.epoch, ack=ack, actor=TRAINER)

    def grafted(self, adaptation: Adaptation) -> Adaptation:
        command = self.dispatched(adaptation)
        self.ack(command, CommandState.ACCEPTED)
        self.ack(
            command,
            CommandState.APPLIED,
            step=120,
            pause_ms=2.5,
            certificate=CERTIFICATE,
            digest_before="a" * 64,
            digest_after="b" * 64,
        )
        adaptation.refresh_from_db()
        return adaptation

    def restart_trainer(self) -> None:
        self.run = make_run(self.owner)


def make_stage() -> Stage:
    owner = make_person("rafi")
    run = make_run(owner)
    Run.objects.filter(pk=run.pk).update(step=1000, last_seen_at=timezone.now())
    run.refresh_from_db()
    return Stage(
        run=run,
        operator=make_person("olga"),
        second=make_person("oscar"),
        owner=owner,
        viewer=make_person("vera"),
        blueprint=make_blueprint(),
    )
