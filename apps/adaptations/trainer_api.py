"""What a trainer calls; its run token works for its own run only."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from django.conf import settings
from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.actors import Actor, ActorKind
from apps.accounts.authentication import actor, person, via
from apps.accounts.endpoint import Endpoint, require, run_of_token
from apps.accounts.policy import Act
from apps.adaptations import services
from apps.adaptations.models import Adaptation
from apps.kernels.services import finite_or_none
from apps.policies.services import current_policy
from apps.rest.fields import body, parse
from apps.rest.filters import whole_number
from apps.rest.idempotency import idempotent
from apps.rest.problems import not_found
from apps.rest.schema import documented
from apps.rest.throttling import TelemetryThrottle, TokenThrottle
from apps.runs.api import TRAINERS, RunList, visible_run
from apps.runs.models import Run
from apps.runs.serializers import (
    AckInput,
    AckOutput,
    FinishInput,
    HelloInput,
    HelloOutput,
    RegistrationOutput,
    RemedyInput,
    RollbackInput,
    RunInput,
    RunOutput,
)
from apps.runs.services import Registration, RunSpec, touch
from apps.telemetry.batch import parse_batch
from apps.telemetry.serializers import IngestedOutput, TelemetryInput
from apps.telemetry.services import ingest_batch
from apps.violations.services import record_findings
from esper.contracts import (
    Certificate,
    CommandAck,
    CommandState,
    RemedyKind,
    RunMode,
    RunState,
    TokenScope,
    ViolationRule,
    signing,
)


class Runs(RunList):
    throttle_classes = (TokenThrottle,)
    writers: ClassVar = frozenset({TokenScope.RUNS_CREATE, TokenScope.ACT})

    @documented("register_run", body=RunInput, answer=RegistrationOutput, status=201, act=True)
    @idempotent
    def post(self, request: Request) -> Response:
        require(person(request), Act.CREATE_RUN)
        given = parse(RunInput, request.data)
        registration = services.register_run(
            owner=person(request),
            actor=actor(request),
            spec=RunSpec(**{**given, "mode": RunMode(given["mode"])}),
            run_uid=run_of_token(request),
        )
        return Response(registration_answer(registration), status=201)


def registration_answer(registration: Registration) -> dict[str, Any]:
    run = registration.run
    return {
        "uid": run.uid,
        "number": run.number,
        "epoch": run.epoch,
        "token": registration.token,
        "resumed": registration.resumed,
        "command_key": signing.public_key(settings.ESPER_COMMAND_KEY),
        "kernel_key": settings.ESPER_KERNEL_PUBLIC_KEY,
        "stream": f"/ws/v1/trainer/{run.uid}",
        "last_command_seq": run.command_seq,
        "policy": current_policy().safety_policy().to_wire(),
        "server_time": time.time(),
    }


class TrainerEndpoint(Endpoint):
    writers: ClassVar = TRAINERS
    throttle_classes = (TelemetryThrottle,)


class Hello(TrainerEndpoint):
    @documented(
        "say_hello", body=HelloInput, answer=HelloOutput, summary="Say what is in the model"
    )
    def post(self, request: Request, uid: str) -> Response:
        run = visible_run(request, uid)
        settled = services.settle_hello(
            run=run, actor=_trainer(request, run), **parse(HelloInput, request.data)
        )
        touch(run)
        answer = [{"adaptation": one.uid, "state": one.state} for one in settled]
        return Response({"settled": answer})


class Telemetry(TrainerEndpoint):
    @documented("send_telemetry", body=TelemetryInput, answer=IngestedOutput, status=202)
    def post(self, request: Request, uid: str) -> Response:
        run = visible_run(request, uid)
        batch = parse_batch(body(request), layers=len(run.layers))
        done = ingest_batch(run=run, batch=batch, record_findings=record_findings)
        answer = {
            "stored": done.stored,
            "duplicate": done.duplicate,
            "slow_down_ms": done.slow_down_ms,
        }
        return Response(answer, status=202)


class CommandAnswer(TrainerEndpoint):
    @documented("acknowledge_command", body=AckInput, answer=AckOutput)
    def post(self, request: Request, uid: str, seq: str) -> Response:
        run = visible_run(request, uid)
        given = parse(AckInput, request.data)
        command = services.acknowledge_command(
            run=run,
            epoch=given.pop("epoch"),
            ack=_ack(_seq(seq), given),
            actor=_trainer(request, run),
        )
        touch(run)
        state = Adaptation.objects.filter(uid=command.adaptation_uid).values_list("state")
        return Response({"adaptation_state": (state.first() or ("",))[0]})


class LocalRollbacks(TrainerEndpoint):
    @documented(
        "report_rollback", body=RollbackInput, answer=AckOutput, summary="What the guard did alone"
    )
    def post(self, request: Request, uid: str) -> Response:
        run = visible_run(request, uid)
        given = parse(RollbackInput, request.data)
        epoch = given.pop("epoch")
        given["rule"] = ViolationRule(given["rule"])
        given["pause_ms"] = finite_or_none(given["pause_ms"]) or 0.0
        adaptation = services.record_local_rollback(
            run=run,
            epoch=epoch,
            report=services.LocalRollback(**given),
            actor=_trainer(request, run),
        )
        touch(run)
        return Response({"adaptation_state": adaptation.state})


class Remedies(TrainerEndpoint):
    @documented(
        "report_remedy", body=RemedyInput, answer=AckOutput, summary="What the script did by itself"
    )
    def post(self, request: Request, uid: str) -> Response:
        run = visible_run(request, uid)
        given = parse(RemedyInput, request.data)
        epoch = given.pop("epoch")
        given["remedy"] = RemedyKind(given["remedy"])
        given["pause_ms"] = finite_or_none(given["pause_ms"])
        remedy = services.record_remedy(
            run=run,
            epoch=epoch,
            report=services.RemedyReport(**given),
            actor=_trainer(request, run),
        )
        touch(run)
        return Response({"adaptation_state": remedy.adaptation.state if remedy.adaptation else ""})


class Finish(TrainerEndpoint):
    @documented("finish_run", body=FinishInput, answer=RunOutput)
    def post(self, request: Request, uid: str) -> Response:
        run = visible_run(request, uid)
        given = parse(FinishInput, request.data)
        given["state"] = RunState(given["state"])
        if (run.epoch, run.state) != (given["epoch"], given["state"]):  # else: said before
            run = services.finish_run(run=run, actor=_trainer(request, run), **given)
        return Response(RunOutput(run).data)


def _trainer(request: Request, run: Run) -> Actor:
    return Actor(ActorKind.TRAINER, run.name, via(request))


def _seq(text: str) -> int:
    try:
        return whole_number(text)
    except ValueError as error:
        raise not_found("command") from error


def _ack(seq: int, given: dict[str, Any]) -> CommandAck:
    certificate = given.pop("certificate")
    return CommandAck(
        seq=seq,
        state=CommandState(given.pop("state")),
        pause_ms=finite_or_none(given.pop("pause_ms")) or 0.0,
        certificate=None if certificate is None else Certificate.from_wire(certificate),
        **given,
    )
