from __future__ import annotations

from typing import ClassVar

from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.authentication import person, via
from apps.accounts.endpoint import READERS, Endpoint, run_of_token
from apps.accounts.policy import Act, may
from apps.rest.etag import cacheable_response
from apps.rest.fields import parse
from apps.rest.filters import apply_filters, many_of, one_of, parse_parameter, text, whole_number
from apps.rest.idempotency import idempotent
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import not_found
from apps.rest.schema import CURSOR, LIMIT, documented, page_of, query, results_of
from apps.rest.throttling import ActThrottle
from apps.runs.models import Run
from apps.runs.selectors import runs
from apps.runs.serializers import CommandOutput, ReasonInput, RunDetailOutput, RunOutput
from apps.runs.services import command_to_wire, commands_after, request_pause, request_stop, touch
from esper.contracts import RunMode, RunState, TokenScope

TRAINERS = frozenset({TokenScope.RUN_WRITE})
FILTERS = {
    "state": ("state", one_of(RunState)),
    "state__in": ("state__in", many_of(RunState)),
    "mode": ("mode", one_of(RunMode)),
    "name": ("name", text),
    "owner": ("owner__username", text),
}


class RunList(Endpoint):
    """``GET runs``; registering, ``POST``, is added where adaptations are known."""

    parameters = PARAMETERS | frozenset(FILTERS)

    @documented(
        "list_runs",
        answer=page_of(RunOutput),
        parameters=[*(query(name) for name in FILTERS), CURSOR, LIMIT],
    )
    def get(self, request: Request) -> Response:
        rows = apply_filters(request, runs(only=run_of_token(request)), FILTERS)
        return page_response(request, rows, lambda rows: RunOutput(rows, many=True).data)


class RunDetail(Endpoint):
    readers: ClassVar = READERS | TRAINERS

    @documented("read_run", answer=RunDetailOutput)
    def get(self, request: Request, uid: str) -> Response:
        return cacheable_response(request, run_answer(request, visible_run(request, uid)))


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
        run = visible_run(request, uid)
        after = parse_parameter(request, "after", whole_number, default=0)
        if run_of_token(request):
            touch(run)
        commands = commands_after(run, after)
        return Response({"results": [command_to_wire(command) for command in commands]})


class PauseAdaptation(Endpoint):
    throttle_classes = (ActThrottle,)

    @documented("pause_adaptation", body=ReasonInput, answer=RunDetailOutput, status=202, act=True)
    @idempotent
    def post(self, request: Request, uid: str) -> Response:
        return _pause(request, uid, paused=True)


class ResumeAdaptation(Endpoint):
    throttle_classes = (ActThrottle,)

    @documented("resume_adaptation", body=ReasonInput, answer=RunDetailOutput, status=202, act=True)
    @idempotent
    def post(self, request: Request, uid: str) -> Response:
        return _pause(request, uid, paused=False)


class StopRun(Endpoint):
    throttle_classes = (ActThrottle,)

    @documented("stop_run", body=ReasonInput, answer=RunDetailOutput, status=202, act=True)
    @idempotent
    def post(self, request: Request, uid: str) -> Response:
        run = visible_run(request, uid)
        reason = parse(ReasonInput, request.data)["reason"]
        request_stop(run=run, user=person(request), via=via(request), reason=reason)
        return _asked(request, run)


def _pause(request: Request, uid: str, *, paused: bool) -> Response:
    run = visible_run(request, uid)
    reason = parse(ReasonInput, request.data)["reason"]
    request_pause(run=run, paused=paused, user=person(request), via=via(request), reason=reason)
    return _asked(request, run)


def _asked(request: Request, run: Run) -> Response:
    """202: it is asked for; the trainer acknowledges it when it gets there."""
    run.refresh_from_db()
    return Response(run_answer(request, run), status=202)


def visible_run(request: Request, uid: str) -> Run:
    """Raises ``Problem`` 404, also for a run that is not the token's."""
    run = runs(only=run_of_token(request)).filter(uid=uid).first()
    if run is None:
        raise not_found("run")
    return run


def run_answer(request: Request, run: Run) -> dict[str, object]:
    user = person(request)
    permissions = {
        str(act): may(user, act, owner_id=run.owner_id)
        for act in (Act.PAUSE_ADAPTATION, Act.STOP_RUN)
    }
    data: dict[str, object] = RunDetailOutput(run, context={"permissions": permissions}).data
    return data
