"""The endpoints of trainers; a run token works for its own run only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from django.http import HttpResponseBase
from drf_spectacular.utils import PolymorphicProxySerializer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.throttling import BaseThrottle
from rest_framework.views import APIView

from apps.accounts.actors import Actor, ActorKind
from apps.accounts.authentication import actor, person, via
from apps.accounts.endpoint import (
    READERS,
    TRAINERS,
    Endpoint,
    project_of_token,
    require,
    run_of_token,
)
from apps.accounts.policy import Act
from apps.accounts.visibility import everything
from apps.adaptations.models import Adaptation
from apps.adaptations.services import judge_remedy, note_lost_commands
from apps.rest.clock import now as database_now
from apps.rest.codec import StrictJSONParser, TelemetryParser
from apps.rest.exports import wants_export
from apps.rest.fields import body, message
from apps.rest.filters import apply_filters, parse_parameter, whole_number
from apps.rest.idempotency import idempotent
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import Problem, not_found
from apps.rest.schema import documented, listing, page_of, query
from apps.rest.throttling import TelemetryThrottle, TokenThrottle
from apps.runs.models import Command, Run
from apps.runs.selectors import FILTERS, HUGE_COLUMNS, ORDER, runs, visible_run
from apps.runs.serializers import CommandOutput, RunOutput
from apps.runs.services import check_epoch, command_to_wire, commands_after, touch
from apps.telemetry.services import seconds_to_pause
from apps.trainers import services
from esper.contracts import RunState, TokenScope, protocol, wire


class Runs(Endpoint):
    """One path for two callers: people list runs, trainers register one."""

    throttle_classes = (TokenThrottle,)
    parameters = PARAMETERS | frozenset(FILTERS)
    writers: ClassVar = frozenset({TokenScope.RUNS_CREATE, TokenScope.ACT})

    @documented(
        "list_runs",
        answer=page_of(RunOutput),
        parameters=listing(FILTERS, ORDER),
    )
    def get(self, request: Request) -> HttpResponseBase:
        found = runs(only=run_of_token(request)).defer(*HUGE_COLUMNS)
        rows = apply_filters(request, found, FILTERS)
        return page_response(
            request, rows, lambda rows: RunOutput(rows, many=True).data, order=ORDER
        )

    @documented(
        "register_run",
        body=protocol.Registration,
        answer=protocol.Registered,
        status=201,
        act=True,
    )
    @idempotent
    def post(self, request: Request) -> Response:
        project_id = project_of_token(request)
        require(person(request), Act.CREATE_RUN, of=_NewRun(project_id))
        with everything():  # the project limits which run it continues
            registration = services.register_run(
                owner=person(request),
                actor=actor(request),
                spec=message(request, protocol.Registration),
                run_uid=run_of_token(request),
                project_id=project_id,
            )
        return Response(wire.to_wire(services.registration_answer(registration)), status=201)


@dataclass(frozen=True, slots=True)
class _NewRun:
    """A run that does not exist yet, in the project of the token."""

    project_id: int
    owner_id: None = None


class TrainerEndpoint(Endpoint):
    writers: ClassVar = TRAINERS
    throttle_classes: tuple[type[BaseThrottle], ...] = (TelemetryThrottle,)


class Hello(TrainerEndpoint):
    @documented(
        "say_hello",
        body=protocol.Hello,
        answer=protocol.HelloAnswer,
        summary="Report the grafts that are in the model",
    )
    def post(self, request: Request, uid: str) -> Response:
        run = _run(request, uid)
        hello = message(request, protocol.Hello)
        settled = services.settle_hello(
            run=run,
            epoch=hello.epoch,
            step=hello.step,
            applied=hello.applied,
            remedies=hello.remedies,
            actor=_trainer(request, run),
            last_command_seq=hello.last_command_seq,
        )
        touch(run)
        answer = protocol.HelloAnswer(
            settled=tuple(protocol.Settled(adaptation=one.uid, state=one.state) for one in settled),
            server_time=database_now().timestamp(),
        )
        return Response(wire.to_wire(answer))


class BackPressure(BaseThrottle):
    """Refuses a run that does not pause as it was told; asked before the body is read."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def allow_request(self, request: Request, view: APIView) -> bool:
        self._seconds = seconds_to_pause(run_of_token(request))
        return self._seconds == 0.0

    def wait(self) -> float:
        return self._seconds


class Telemetry(TrainerEndpoint):
    throttle_classes = (BackPressure, TelemetryThrottle)
    parser_classes = (StrictJSONParser, TelemetryParser)

    @documented(
        "send_telemetry", body=protocol.Telemetry, answer=protocol.TelemetryAnswer, status=202
    )
    def post(self, request: Request, uid: str) -> Response:
        run = visible_run(uid, only=run_of_token(request), without=HUGE_COLUMNS)
        answer = services.take_telemetry(run=run, batch=message(request, protocol.Telemetry))
        return Response(wire.to_wire(answer), status=202)


_COMMAND_LISTS: list[Any] = [page_of(CommandOutput), protocol.Commands]


class RunCommands(Endpoint):
    """One path for two callers: people read the whole log, a trainer what it has to answer."""

    readers: ClassVar = READERS | TRAINERS
    parameters = PARAMETERS | frozenset({"after", "epoch"})

    @documented(
        "list_commands",
        answer=PolymorphicProxySerializer("CommandList", _COMMAND_LISTS, None),
        parameters=[
            query("after", whole_number, "The last sequence number that is known already."),
            query("epoch", whole_number, "The trainer's; another one than the run's answers 409."),
            *listing(),
        ],
        summary="The commands of a run with their answers, newest first. "
        "To its trainer: the signed ones that it has not answered, oldest first",
    )
    def get(self, request: Request, uid: str) -> HttpResponseBase:
        run = _run(request, uid)
        after = parse_parameter(request, "after", whole_number, default=0)
        epoch = parse_parameter(request, "epoch", whole_number)
        if not run_of_token(request):
            rows = Command.objects.filter(run=run, seq__gt=after)
            return page_response(request, rows, lambda rows: CommandOutput(rows, many=True).data)
        if wants_export(request):
            raise Problem(406, "not-acceptable", "A trainer reads its commands in JSON only.")
        touch(run)
        if after > run.command_seq:
            note_lost_commands(run, after=after, actor=_trainer(request, run))
        if epoch is not None:
            check_epoch(run, epoch)
        commands = commands_after(run, after)
        return Response({"results": [command_to_wire(command) for command in commands]})


class CommandAnswer(TrainerEndpoint):
    @documented("acknowledge_command", body=protocol.Answer, answer=protocol.AdaptationAnswer)
    def post(self, request: Request, uid: str, seq: str) -> Response:
        run = _run(request, uid)
        answer = wire.from_wire(protocol.Answer, {**body(request), "seq": _seq(seq)})
        command = services.acknowledge_command(
            run=run, epoch=answer.epoch, ack=answer, actor=_trainer(request, run)
        )
        touch(run)
        state = Adaptation.objects.filter(uid=command.adaptation_uid).values_list("state")
        return _adaptation_answer((state.first() or ("",))[0])


class LocalRollbacks(TrainerEndpoint):
    @documented(
        "report_rollback",
        body=protocol.Rollback,
        answer=protocol.AdaptationAnswer,
        summary="Report what the trainer's guard took out by itself",
    )
    def post(self, request: Request, uid: str) -> Response:
        run = _run(request, uid)
        adaptation = services.record_local_rollback(
            run=run, report=message(request, protocol.Rollback), actor=_trainer(request, run)
        )
        touch(run)
        return _adaptation_answer(adaptation.state)


class Remedies(TrainerEndpoint):
    @documented(
        "report_remedy",
        body=protocol.RemedyReport,
        answer=protocol.AdaptationAnswer,
        summary="Report what the training script changed by itself",
    )
    def post(self, request: Request, uid: str) -> Response:
        run = _run(request, uid)
        remedy = services.record_remedy(
            run=run, report=message(request, protocol.RemedyReport), actor=_trainer(request, run)
        )
        touch(run)
        return _adaptation_answer(remedy.adaptation.state if remedy.adaptation else "")


class RemedyProposals(TrainerEndpoint):
    @documented(
        "propose_remedy",
        body=protocol.RemedyProposal,
        answer=protocol.RemedyAnswer,
        summary="Propose a remedy for a finding, or ask for the state of the proposal",
    )
    def post(self, request: Request, uid: str) -> Response:
        run = _run(request, uid)
        answer = services.take_proposal(
            run=run,
            proposal=message(request, protocol.RemedyProposal),
            actor=_trainer(request, run),
        )
        touch(run)
        return Response(wire.to_wire(answer))


class RemedyVerdicts(TrainerEndpoint):
    @documented(
        "judge_remedy",
        body=protocol.RemedyVerdict,
        answer=protocol.AdaptationAnswer,
        summary="Say whether the finding that a remedy answers is over",
    )
    def post(self, request: Request, uid: str) -> Response:
        run = _run(request, uid)
        adaptation = judge_remedy(
            run=run, verdict=message(request, protocol.RemedyVerdict), actor=_trainer(request, run)
        )
        touch(run)
        return _adaptation_answer(adaptation.state)


class Finish(TrainerEndpoint):
    @documented("finish_run", body=protocol.Finish, answer=RunOutput)
    def post(self, request: Request, uid: str) -> Response:
        run = _run(request, uid)
        finish = message(request, protocol.Finish)
        if (run.epoch, run.state) != (finish.epoch, finish.state):  # else: reported before
            run = services.finish_run(
                run=run,
                epoch=finish.epoch,
                state=RunState(finish.state),
                step=finish.step,
                reason=finish.reason,
                actor=_trainer(request, run),
            )
        return Response(RunOutput(run).data)


def _adaptation_answer(state: str) -> Response:
    return Response(wire.to_wire(protocol.AdaptationAnswer(adaptation_state=state)))


def _run(request: Request, uid: str) -> Run:
    return visible_run(uid, only=run_of_token(request))


def _trainer(request: Request, run: Run) -> Actor:
    return Actor(ActorKind.TRAINER, run.name, via(request))


def _seq(text: str) -> int:
    try:
        seq: int = whole_number(text)
    except ValueError as error:
        raise not_found("command") from error
    return seq
