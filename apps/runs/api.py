from __future__ import annotations

from typing import ClassVar

from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.act_endpoint import act_endpoint
from apps.accounts.authentication import person
from apps.accounts.endpoint import READERS, TRAINERS, Endpoint, run_of_token
from apps.rest.etag import cacheable_response
from apps.rest.schema import documented
from apps.runs.selectors import visible_run
from apps.runs.serializers import RunDetailOutput, run_answer
from apps.runs.services import request_stop


class RunDetail(Endpoint):
    readers: ClassVar = READERS | TRAINERS

    @documented("read_run", answer=RunDetailOutput)
    def get(self, request: Request, uid: str) -> Response:
        return cacheable_response(
            request, run_answer(person(request), visible_run(uid, only=run_of_token(request)))
        )


StopRun = act_endpoint(
    "stop_run",
    request_stop,
    subject="run",
    find=lambda request, uid: visible_run(uid, only=run_of_token(request)),
    # 202: the command is issued; the trainer acknowledges it later.
    answer=lambda request, run: Response(run_answer(person(request), run), status=202),
    output=RunDetailOutput,
    status=202,
)
