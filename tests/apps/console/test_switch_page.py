"""The adaptation switch's page: who has confirmed, after how long; and one blueprint alone."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from apps.adaptations import services
from apps.adaptations.models import Adaptation
from apps.blueprints.models import Blueprint
from apps.rest.problems import Problem
from apps.runs.models import Command, Run
from esper.contracts import AdaptationState, CommandState, RunState
from tests.apps.stage import Stage

pytestmark = pytest.mark.django_db


def test_the_page_says_which_trainers_have_confirmed_and_after_how_long(world: Any) -> None:
    services.set_adaptation_switch(on=False, user=world.people["olga"], via="")
    command = Command.objects.get(run=world.runs["digits-cnn"], kind="pause_adaptation")
    Command.objects.filter(pk=command.pk).update(
        state=CommandState.APPLIED,
        step=301,
        acknowledged_at=command.issued_at + timedelta(seconds=2.5),
    )
    Run.objects.filter(name="topics-lm").update(state=RunState.UNREACHABLE)
    text = world.client("olga").get("/switch").content.decode()
    assert "Killed everywhere" in text
    assert "1 of 2 trainers have confirmed, the slowest after 2.5 s." in text
    assert text.index("topics-lm</a>") < text.index("digits-cnn</a>")  # still to be looked after
    assert "Unreachable: it is not known whether it has obeyed" in text
    assert "Confirmed" in text
    assert "Kill all adaptation" not in world.client("vera").get("/switch").content.decode()


def _disable() -> None:
    Blueprint.objects.update(enabled=False, disabled_reason="it diverges in bf16")


def test_a_blueprint_that_is_switched_off_is_not_approved(stage: Stage) -> None:
    adaptation = stage.waiting()
    _disable()
    adaptation = Adaptation.objects.get(pk=adaptation.pk)
    with pytest.raises(Problem) as refused:
        services.approve_adaptation(
            adaptation=adaptation,
            user=stage.operator,
            via="",
            version=adaptation.version,
            evidence_hash=adaptation.evidence_hash,
        )
    assert (refused.value.status, refused.value.code) == (423, "adaptation-killed")
    assert "it diverges in bf16" in str(refused.value)


def test_a_blueprint_that_is_switched_off_does_not_reach_its_run(stage: Stage) -> None:
    adaptation = stage.compiled(stage.propose())
    _disable()
    services.dispatch_adaptation(adaptation.uid, worker="compile@here")
    adaptation.refresh_from_db()
    assert adaptation.state == AdaptationState.CANCELLED
    assert adaptation.end_reason.startswith("blueprint proj_lora_64 is switched off")
    assert not Command.objects.filter(adaptation_uid=adaptation.uid).exists()
