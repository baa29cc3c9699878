"""The clock of a web process or a worker is wrong by an hour; the database's decides."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
from django.db import connection
from django.utils import timezone

from apps.adaptations import services
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.rest.problems import Problem
from apps.runs.models import Command, Run
from apps.runs.services import commands_after, touch
from apps.trainers.services import register_run, registration_answer
from apps.workers import services as workers
from apps.workers.models import CompileJob
from esper.contracts import AdaptationState
from tests.apps.cast import TRAINER, make_registration
from tests.apps.stage import Stage

pytestmark = [pytest.mark.django_db, pytest.mark.postgres]

S = AdaptationState


def true_time() -> datetime:
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        found: datetime = cursor.fetchone()[0]
    return found


@pytest.fixture(params=[1, -1], ids=["an hour fast", "an hour slow"])
def wrong_clock(stage: Stage, request: pytest.FixtureRequest) -> Iterator[None]:
    """From here on; what is there was written by processes with a right one."""
    error = timedelta(hours=request.param)
    right, right_seconds = timezone.now, time.time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timezone, "now", lambda: right() + error)
        patch.setattr(time, "time", lambda: right_seconds() + error.total_seconds())
        yield


def approve(stage: Stage, adaptation: Adaptation) -> None:
    services.approve_adaptation(
        adaptation=adaptation,
        user=stage.operator,
        via="test",
        version=adaptation.version,
        evidence_hash=adaptation.evidence_hash,
        reason="yes",
    )


def test_a_command_is_valid_for_its_time_and_no_longer(stage: Stage, wrong_clock: None) -> None:
    adaptation = stage.waiting()
    approve(stage, adaptation)
    command = stage.dispatched(adaptation)
    assert commands_after(stage.run, 0) == [command]
    left = command.expires_at - true_time()
    limit = adaptation.safety_policy.safety_policy().dispatch_timeout_seconds
    assert timedelta(seconds=limit - 60) < left <= timedelta(seconds=limit)
    Command.objects.update(expires_at=true_time() - timedelta(seconds=1))
    assert commands_after(stage.run, 0) == []


def test_the_sweep_ends_nothing_before_its_deadline_and_everything_after_it(
    stage: Stage, wrong_clock: None
) -> None:
    adaptation = stage.waiting()
    touch(stage.run)
    services.sweep()
    adaptation.refresh_from_db()
    stage.run.refresh_from_db()
    assert (adaptation.state, stage.run.ended) == (S.AWAITING_APPROVAL, False)
    assert stage.run.state != "unreachable"
    Adaptation.objects.update(deadline_at=true_time() - timedelta(seconds=1))
    with pytest.raises(Problem, match="The deadline has passed"):
        approve(stage, adaptation)
    services.sweep()
    adaptation.refresh_from_db()
    assert adaptation.state == S.EXPIRED


def test_a_silent_trainer_is_seen_and_a_lease_is_as_long_as_it_should_be(
    stage: Stage, wrong_clock: None
) -> None:
    stage.propose()
    assert workers.claim_job(CompileJob.objects.get(), worker="compile@here")
    lease = CompileJob.objects.get().lease_until
    assert lease is not None
    assert abs(lease - true_time()) < timedelta(minutes=5)
    Run.objects.update(last_seen_at=true_time() - timedelta(minutes=10))
    services.sweep()
    stage.run.refresh_from_db()
    assert stage.run.state == "unreachable"


def test_a_trainer_learns_the_time_of_the_database(stage: Stage, wrong_clock: None) -> None:
    registration = register_run(owner=stage.owner, actor=TRAINER, spec=make_registration())
    answer = registration_answer(registration)
    assert abs(answer.server_time - true_time().timestamp()) < 60


def test_an_audit_event_has_the_time_of_the_database(stage: Stage, wrong_clock: None) -> None:
    stage.propose()
    event = AuditEvent.objects.latest("id")
    assert abs(event.at - true_time()) < timedelta(minutes=5)
