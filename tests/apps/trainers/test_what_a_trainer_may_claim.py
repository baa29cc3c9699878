"""A trainer's answers are checked: failing certificates, commands that came twice."""

from __future__ import annotations

from dataclasses import replace
from math import nan
from typing import Any

import pytest

from apps.audit.models import AuditEvent
from apps.runs.models import Command
from apps.violations.models import Violation
from esper.contracts import (
    AdaptationState,
    CommandKind,
    CommandState,
    RefusalCode,
    ViolationRule,
)
from tests.apps.cast import CERTIFICATE
from tests.apps.stage import Stage


@pytest.mark.parametrize(
    "claim",
    [
        {"failures": ("output at birth differs by 0.3",)},
        {"max_abs_diff": 0.3},
        {"max_abs_diff": nan},
        {"preserving": False},
        {"live": False},
        {"rng_neutral": False},
    ],
)
def test_a_graft_that_was_applied_with_a_failing_certificate_is_taken_out_again(
    stage: Stage, claim: dict[str, Any]
) -> None:
    adaptation = stage.propose()
    command = stage.dispatched(adaptation)
    stage.ack(command, CommandState.ACCEPTED)

    stage.ack(command, CommandState.APPLIED, step=9, certificate=replace(CERTIFICATE, **claim))

    adaptation.refresh_from_db()
    assert adaptation.state == AdaptationState.ROLLING_BACK
    assert stage.command(adaptation).kind == CommandKind.UNDO
    assert Violation.objects.filter(
        adaptation_uid=adaptation.uid, rule=ViolationRule.CERTIFICATE
    ).exists()


def test_a_passing_certificate_leads_to_probation(stage: Stage) -> None:
    adaptation = stage.propose()
    command = stage.dispatched(adaptation)

    stage.ack(command, CommandState.APPLIED, step=9, certificate=CERTIFICATE)

    adaptation.refresh_from_db()
    assert adaptation.state == AdaptationState.PROBATION


@pytest.mark.parametrize(
    "code",
    [
        RefusalCode.REPLAYED,
        RefusalCode.FOREIGN_RUN,
        RefusalCode.OLD_EPOCH,
        RefusalCode.BAD_SIGNATURE,
    ],
)
def test_a_forgery_that_the_trainer_refused_is_audited_and_changes_nothing(
    stage: Stage, code: RefusalCode
) -> None:
    adaptation = stage.propose()
    command = stage.dispatched(adaptation)
    stage.ack(command, CommandState.APPLIED, step=9, certificate=CERTIFICATE)

    for _ in range(2):  # the trainer repeats what was not answered
        stage.ack(command, CommandState.REFUSED, code=str(code), reason="it came before")

    adaptation.refresh_from_db()
    assert adaptation.state == AdaptationState.PROBATION
    assert Command.objects.get(pk=command.pk).state == CommandState.APPLIED
    event = AuditEvent.objects.get(act="command.forgery_refused")
    assert (event.reason, event.data["code"]) == ("it came before", code)
    assert Violation.objects.filter(rule=ViolationRule.SIGNATURE).count() == 1
