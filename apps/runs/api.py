from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.act_endpoint import act_endpoint
from apps.accounts.authentication import person
from apps.accounts.endpoint import READERS, TRAINERS, Endpoint, run_of_token
from apps.accounts.policy import Act, may
from apps.rest.etag import cacheable_response
from apps.rest.schema import documented
from apps.runs.models import Run
from apps.runs.selectors import visible_run
from apps.runs.serializers import RunDetailOutput
from apps.runs.services import request_pause, request_stop


class RunDetail(Endpoint):
    readers: ClassVar = READERS | TRAINERS

    @documented("read_run", answer=RunDetailOutput)
    def get(self, request: Request, uid: str) -> Response:
        return cacheable_response(
            request, run_answer(request, visible_run(uid, only=run_of_token(request)))
        )


def _act(name: str, service: Callable[..., Run]) -> type[Endpoint]:
    return act_endpoint(
        name,
        service,
        subject="run",
        find=lambda request, uid: visible_run(uid, only=run_of_token(request)),
        # 202: the command is issued; the trainer acknowledges it later.
        answer=lambda request, run: Response(run_answer(request, run), status=202),
        output=RunDetailOutput,
        status=202,
    )


PauseAdaptation = _act("pause_adaptation", partial(request_pause, paused=True))
ResumeAdaptation = _act("resume_adaptation", partial(request_pause, paused=False))
StopRun = _act("stop_run", request_stop)


def run_answer(request: Request, run: Run) -> dict[str, object]:
    user = person(request)
    permissions = {
        str(act): may(user, act, owner_id=run.owner_id)
        for act in (Act.PAUSE_ADAPTATION, Act.STOP_RUN)
    }
    data: dict[str, object] = RunDetailOutput(run, context={"permissions": permissions}).data
    return data
