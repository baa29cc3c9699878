"""The endpoints of trainers; a run token works for its own run only."""

from __future__ import annotations

from typing import Any, ClassVar

from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.actors import Actor, ActorKind
from apps.accounts.authentication import actor, person, via
from apps.accounts.endpoint import READERS, TRAINERS, Endpoint, require, run_of_token
from apps.accounts.policy import Act
from apps.adaptations.models import Adaptation
from apps.rest.fields import body, parse
from apps.rest.filters import apply_filters, parse_parameter, whole_number
from apps.rest.idempotency import idempotent
from apps.rest.numbers import finite_or_none
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import not_found
from apps.rest.schema import CURSOR, LIMIT, documented, page_of, query, results_of
from apps.rest.throttling import TelemetryThrottle, TokenThrottle
from apps.runs.models import Run
from apps.runs.selectors import FILTERS, runs, visible_run
from apps.runs.serializers import RunOutput
from apps.runs.services import RunSpec, command_to_wire, commands_after, touch
from apps.trainers import services
from apps.trainers.serializers import (
    AckInput,
    AckOutput,
    CommandOutput,
    FinishInput,
    HelloInput,
    HelloOutput,
    IngestedOutput,
    RegistrationOutput,
    RemedyInput,
    RollbackInput,
    RunInput,
    TelemetryInput,
)
from esper.contracts import (
    Certificate,
    CommandAck,
    CommandState,
    RemedyKind,
    RunMode,
    RunState,
    TokenScope,
    ViolationRule,
)


class Runs(Endpoint):
    """One path for two callers: people list runs, trainers register one."""

    throttle_classes = (TokenThrottle,)
    parameters = PARAMETERS | frozenset(FILTERS)
    writers: ClassVar = frozenset({TokenScope.RUNS_CREATE, TokenScope.ACT})

    @documented(
        "list_runs",
        answer=page_of(RunOutput),
        parameters=[*(query(name) for name in FILTERS), CURSOR, LIMIT],
    )
    def get(self, request: Request) -> Response:
        rows = apply_filters(request, runs(only=run_of_token(request)), FILTERS)
        return page_response(request, rows, lambda rows: RunOutput(rows, many=True).data)

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
        return Response(services.registration_answer(registration), status=201)


class TrainerEndpoint(Endpoint):
    writers: ClassVar = TRAINERS
    throttle_classes = (TelemetryThrottle,)


class Hello(TrainerEndpoint):
    @documented(
        "say_hello",
        body=HelloInput,
        answer=HelloOutput,
        summary="Report the grafts that are in the model",
    )
    def post(self, request: Request, uid: str) -> Response:
        run = _run(request, uid)
        settled = services.settle_hello(
            run=run, actor=_trainer(request, run), **parse(HelloInput, request.data)
        )
        touch(run)
        answer = [{"adaptation": one.uid, "state": one.state} for one in settled]
        return Response({"settled": answer})


class Telemetry(TrainerEndpoint):
    @documented("send_telemetry", body=TelemetryInput, answer=IngestedOutput, status=202)
    def post(self, request: Request, uid: str) -> Response:
        run = _run(request, uid)
        done = services.take_telemetry(run=run, data=body(request))
        answer = {
            "stored": done.stored,
            "duplicate": done.duplicate,
            "slow_down_ms": done.slow_down_ms,
        }
        return Response(answer, status=202)


class RunCommands(Endpoint):
    readers: ClassVar = READERS | TRAINERS
    parameters = frozenset({"after"})

    @documented(
        "list_commands",
        answer=results_of(CommandOutput),
        parameters=[query("after", int, "The last sequence number that is known already.")],
        summary="Commands that the trainer has not answered, oldest first",
    )
    def get(self, request: Request, uid: str) -> Response:
        run = _run(request, uid)
        after = parse_parameter(request, "after", whole_number, default=0)
        if run_of_token(request):
            touch(run)
        commands = commands_after(run, after)
        return Response({"results": [command_to_wire(command) for command in commands]})


class CommandAnswer(TrainerEndpoint):
    @documented("acknowledge_command", body=AckInput, answer=AckOutput)
    def post(self, request: Request, uid: str, seq: str) -> Response:
        run = _run(request, uid)
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
        "report_rollback",
        body=RollbackInput,
        answer=AckOutput,
        summary="Report what the trainer's guard took out by itself",
    )
    def post(self, request: Request, uid: str) -> Response:
        run = _run(request, uid)
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
        "report_remedy",
        body=RemedyInput,
        answer=AckOutput,
        summary="Report what the training script changed by itself",
    )
    def post(self, request: Request, uid: str) -> Response:
        run = _run(request, uid)
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
        run = _run(request, uid)
        given = parse(FinishInput, request.data)
        given["state"] = RunState(given["state"])
        if (run.epoch, run.state) != (given["epoch"], given["state"]):  # else: said before
            run = services.finish_run(run=run, actor=_trainer(request, run), **given)
        return Response(RunOutput(run).data)


def _run(request: Request, uid: str) -> Run:
    return visible_run(uid, only=run_of_token(request))


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
