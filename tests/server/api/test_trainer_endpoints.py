"""What a trainer calls, over real HTTP paths, with the shapes of docs/protocol.md."""

from __future__ import annotations

from typing import Any

import pytest
from django.conf import settings

from apps.accounts.models import ApiToken, User
from apps.runs.models import Command, Run
from apps.runs.services import issue_command
from apps.telemetry.models import Frame, Metric
from apps.violations.models import Violation
from esper.compilation import KernelStore
from esper.contracts import (
    BUNDLE_FILES,
    CommandAck,
    CommandKind,
    CommandState,
    KernelBundle,
    Role,
    RunState,
    TokenScope,
    signing,
)
from esper.contracts import Command as CommandContract

pytestmark = pytest.mark.django_db


def test_registering_answers_with_everything_that_a_trainer_needs(trainer: Any) -> None:
    assert set(trainer.answer) == {
        "uid",
        "number",
        "epoch",
        "token",
        "resumed",
        "command_key",
        "kernel_key",
        "stream",
        "last_command_seq",
        "policy",
        "server_time",
    }
    assert trainer.answer["epoch"] == 1
    assert trainer.answer["resumed"] is False
    assert trainer.answer["stream"] == f"/ws/v1/trainer/{trainer.run}"
    assert trainer.answer["command_key"] == signing.public_key(settings.ESPER_COMMAND_KEY)
    token = ApiToken.objects.get(run_uid=trainer.run)
    assert token.scopes == ["run:write"]


def test_the_same_name_again_is_a_restart_and_ends_the_old_token(
    trainer: Any, people: dict[Role, User], request: pytest.FixtureRequest
) -> None:
    again = _register(people[Role.RESEARCHER])
    assert (again["uid"], again["epoch"], again["resumed"]) == (trainer.run, 2, True)
    refused = trainer.send()
    assert (refused.status, refused.code) == (401, "not-signed-in")
    trainer.token = again["token"]
    old = trainer.post(f"{trainer.path}/hello", {"epoch": 1, "step": 0, "applied": []})
    assert (old.status, old.code) == (409, "old-epoch")
    trainer.epoch = 2
    hello = trainer.post(f"{trainer.path}/hello", {"epoch": 2, "step": 0, "applied": []})
    assert (hello.status, hello.data) == (200, {"settled": []})


def _register(user: User, **changes: Any) -> dict[str, Any]:
    from apps.accounts.services import issue_token

    conftest = _conftest()
    secret = issue_token(owner=user, name="test", scopes=[TokenScope.RUNS_CREATE])[1]
    answer = conftest.Caller(secret).post("runs", conftest.registration(**changes))
    data: dict[str, Any] = answer.data
    return data
