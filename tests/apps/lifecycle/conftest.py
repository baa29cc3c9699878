"""A small cast for the life of an adaptation: people, a run, a blueprint, a trainer's answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
from django.utils import timezone

from apps.accounts.actors import Actor, ActorKind
from apps.accounts.models import User
from apps.adaptations import services
from apps.adaptations.compile_jobs import queue_dispatch
from apps.adaptations.lifecycle import transition
from apps.adaptations.models import Adaptation
from apps.blueprints.models import Blueprint
from apps.kernels.models import Kernel
from apps.runs.models import Command, Run
from apps.trainers import services as trainers
from apps.workers import services as workers
from esper.contracts import (
    AdaptationState,
    AdaptationType,
    Certificate,
    CommandAck,
    CommandState,
    CostForecast,
    LayerInfo,
    Risk,
    Role,
    RunMode,
)
from esper.contracts.protocol import Proposal, Registration

TAMIYO = Actor(ActorKind.TAMIYO, "tamiyo")
TRAINER = Actor(ActorKind.TRAINER, "digits")
WORKER = Actor(ActorKind.WORKER, "compile@here")


def layer(name: str = "fc", **changes: Any) -> LayerInfo:
    info = LayerInfo(
        name=name,
        kind="Linear",
        in_shape=(8, 64),
        out_shape=(8, 64),
        dtype="float32",
        parameters=64 * 65,
        graftable=True,
        features_in=64,
        features_out=64,
    )
    return replace(info, **changes)


CERTIFICATE = Certificate(
    max_abs_diff=0.0,
    tolerance=0.0,
    preserving=True,
    live=True,
    rng_neutral=True,
    parameters=2048,
    parameters_declared=2048,
    latency_ms=0.1,
    memory_mib=0.1,
)


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
        assert workers.finish_job(job, kernel_digest=a_kernel().digest, cached=False, build_ms=20.0)
        transition(adaptation, AdaptationState.COMPILED, actor=WORKER, kernel=a_kernel())
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
        self.run = trainers.register_run(owner=self.owner, actor=TRAINER, spec=run_spec()).run


def run_spec() -> Registration:
    return Registration(
        name="digits",
        mode=RunMode.AUTOMATIC,
        host="elsewhere",
        capability="cpu",
        model_parameters=100_000,
        layers=(layer("fc"), layer("head"), layer("frozen", graftable=False, reason="a container")),
    )


def a_kernel() -> Kernel:
    kernel, _ = Kernel.objects.get_or_create(
        digest="d" * 64,
        defaults={
            "key_hash": "e" * 64,
            "blueprint_slug": "proj_lora_64",
            "layer_kind": "Linear",
            "dtype": "float32",
            "capability": "cpu",
            "device_name": "cpu",
            "parameters": 2048,
            "latency_ms": 0.1,
            "memory_mib": 0.1,
            "certificate": CERTIFICATE.to_wire(),
            "build_ms": 20.0,
            "size_bytes": 2000,
            "built_by": "compile@here",
        },
    )
    return kernel


def person(name: str, role: Role) -> User:
    return User.objects.create_user(username=name, password="a long password", role=role)


@pytest.fixture
def stage(db: None) -> Stage:
    owner = person("rafi", Role.RESEARCHER)
    run = trainers.register_run(owner=owner, actor=TRAINER, spec=run_spec()).run
    Run.objects.filter(pk=run.pk).update(step=1000, last_seen_at=timezone.now())
    run.refresh_from_db()
    blueprint = Blueprint.objects.create(
        slug="proj_lora_64",
        ident="BP-PROJ-LoRA-64",
        title="Low-rank update",
        category="efficiency",
        kind="parallel",
        adaptation_type="add_efficiency",
        risk="low",
        idea="…",
        version="0" * 16,
    )
    return Stage(
        run=run,
        operator=person("olga", Role.OPERATOR),
        second=person("oscar", Role.OPERATOR),
        owner=owner,
        viewer=person("vera", Role.VIEWER),
        blueprint=blueprint,
    )


NAN = math.nan
