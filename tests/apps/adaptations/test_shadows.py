"""A person asks for a trial in shadow; the trainer's answer stands on the page of the decision."""

from __future__ import annotations

from typing import Any

import pytest
from django.conf import LazySettings
from django.test import Client

from apps.adaptations import services
from apps.adaptations.models import Adaptation, ShadowTrial
from apps.audit.models import AuditEvent
from apps.rest.problems import Problem
from apps.runs.models import Command
from esper.contracts import AdaptationState, CommandKind, CommandState, RefusalCode, TokenScope
from tests.apps.callers import Caller
from tests.apps.cast import token_of
from tests.apps.stage import Stage

pytestmark = pytest.mark.django_db
FOUND = {"gain": 0.031, "low": 0.012, "high": 0.05, "steps": 200, "looks": 12, "seconds": 4.5}


def asked(stage: Stage, adaptation: Adaptation, **changes: Any) -> Command:
    values = {"user": stage.operator, "via": "session", "reason": "thin evidence", **changes}
    services.ask_for_shadow(adaptation=adaptation, **values)
    return Command.objects.get(kind=CommandKind.SHADOW)


def page(stage: Stage, adaptation: Adaptation) -> str:
    client = Client()
    client.force_login(stage.operator)
    return client.get(f"/adaptations/{adaptation.uid}").content.decode()


def test_the_trainer_is_told_what_to_try_and_its_answer_is_kept(stage: Stage) -> None:
    adaptation = stage.waiting()
    assert "Run in shadow" in page(stage, adaptation)
    command = asked(stage, adaptation, steps=300, seconds=30)
    assert command.payload == {
        "blueprint": adaptation.slug, "since": "", "config": {"rank": 4}, "steps": 300,
        "seconds": 30,
    }  # fmt: skip
    assert "told to try it" in page(stage, adaptation)
    stage.ack(command, CommandState.ACCEPTED)
    assert "A trial is under way" in page(stage, adaptation)
    stage.ack(command, CommandState.APPLIED, step=1200, details={**FOUND, "layer": "fc"})
    trial = ShadowTrial.objects.get()
    assert {name: getattr(trial, name) for name in FOUND} == FOUND
    shown = page(stage, adaptation)
    assert "It helps:" in shown
    assert "+3.1% (95%: +1.2% to +5%)" in shown
    adaptation.refresh_from_db()
    assert adaptation.state == AdaptationState.AWAITING_APPROVAL  # evidence decides nothing
    event = AuditEvent.objects.get(act="adaptation.shadow")
    assert (event.actor, event.reason) == ("olga", "thin evidence")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"low": -0.05, "high": 0.001}, "It does not help:"),
        ({"low": -0.05}, "Nothing is shown:"),
        ({"low": None, "high": None}, "too few looks"),
        ({"gain": "3 %", "steps": -1, "looks": True}, "unknown"),
    ],
    ids=["no", "unclear", "no interval", "nonsense"],
)
def test_the_page_claims_no_more_than_was_shown(
    stage: Stage, found: dict[str, Any], words: str
) -> None:
    adaptation = stage.waiting()
    command = asked(stage, adaptation)
    stage.ack(command, CommandState.APPLIED, step=1200, details={**FOUND, **found})
    assert words in page(stage, adaptation)


def test_a_trainer_that_cannot_do_it_says_why(stage: Stage) -> None:
    adaptation = stage.waiting()
    reason = {"code": RefusalCode.DOES_NOT_FIT, "reason": "attach(shadow=Shadow(...))"}
    stage.ack(asked(stage, adaptation), CommandState.REFUSED, **reason)
    shown = page(stage, adaptation)
    assert "The trial was refused: attach(shadow=Shadow(...))" in shown
    assert "Run in shadow" in shown  # again, if the script is changed


def test_who_may_ask_and_when(stage: Stage) -> None:
    adaptation = stage.waiting()
    with pytest.raises(Problem) as caught:
        asked(stage, adaptation, user=stage.viewer)
    assert caught.value.code == "not-eligible"
    asked(stage, adaptation, user=stage.owner)
    with pytest.raises(Problem) as caught:
        asked(stage, adaptation)
    assert caught.value.code == "shadow-running"
    services.reject_adaptation(
        adaptation=adaptation, user=stage.operator, via="session", version=adaptation.version,
        reason="no",
    )  # fmt: skip
    with pytest.raises(Problem) as caught:
        asked(stage, adaptation)
    assert caught.value.code == "decision-not-pending"


@pytest.mark.parametrize(("percent", "trials"), [(0, 0), (100, 1)])
def test_a_random_share_is_tried_without_being_asked_for(
    stage: Stage, settings: LazySettings, percent: int, trials: int
) -> None:
    settings.ESPER_SHADOW_PERCENT = percent
    adaptation = stage.waiting()
    assert ShadowTrial.objects.filter(adaptation=adaptation, asked_by=None).count() == trials


def test_the_api_asks_and_shows_the_result(stage: Stage) -> None:
    adaptation = stage.waiting()
    caller = Caller(token_of(stage.operator, TokenScope.READ, TokenScope.ACT))
    assert caller.post(f"adaptations/{adaptation.uid}/shadow", {"steps": 0}).status == 400
    answer = caller.post(f"adaptations/{adaptation.uid}/shadow", {"steps": 50})
    assert answer.status == 200, answer.data
    (trial,) = answer.data["shadows"]
    assert (trial["state"], trial["asked_by"], trial["most_steps"]) == ("requested", "olga", 50)
    stage.ack(Command.objects.get(kind="shadow"), CommandState.APPLIED, step=9, details=FOUND)
    (trial,) = caller.get(f"adaptations/{adaptation.uid}").data["shadows"]
    assert (trial["state"], trial["gain"], trial["low"]) == ("done", 0.031, 0.012)
