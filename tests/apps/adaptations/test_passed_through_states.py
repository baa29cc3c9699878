"""No adaptation is ever left in a state that is passed through: what is committed has moved on."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.db import connection
from django.utils import timezone

from apps.adaptations import acts, compile_jobs, services
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.notifications.models import FeedEvent
from apps.rest.problems import Problem
from esper.contracts import ADAPTATION_PASSED_THROUGH, AdaptationState
from tests.apps.stage import Stage

S = AdaptationState

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def committed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every state that an adaptation had when a transaction was committed."""
    states: list[str] = []
    commit = connection.commit

    def commit_and_look() -> None:
        states.extend(Adaptation.objects.values_list("state", flat=True))
        commit()

    monkeypatch.setattr(connection, "commit", commit_and_look)
    return states


def approve(stage: Stage, adaptation: Adaptation) -> Adaptation:
    return services.approve_adaptation(
        adaptation=adaptation,
        user=stage.operator,
        via="api",
        version=adaptation.version,
        evidence_hash=adaptation.evidence_hash,
        reason="looks fine",
    )


def test_an_approval_by_rule_is_committed_as_a_queued_job(
    stage: Stage, committed: list[str]
) -> None:
    stage.propose()

    assert set(committed) == {S.COMPILE_QUEUED}


def test_an_approval_by_a_person_is_committed_as_a_queued_job(
    stage: Stage, committed: list[str]
) -> None:
    approve(stage, stage.waiting())

    assert set(committed) == {S.AWAITING_APPROVAL, S.COMPILE_QUEUED}


@pytest.mark.parametrize("by", ["a rule", "a person"])
def test_an_approval_whose_job_cannot_be_queued_is_not_committed(
    stage: Stage, committed: list[str], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    waiting = stage.waiting() if by == "a person" else None

    def fail(**_: object) -> None:
        raise RuntimeError("the queue is broken")

    monkeypatch.setattr(compile_jobs.workers, "queue_job", fail)

    with pytest.raises(RuntimeError):
        approve(stage, waiting) if waiting else stage.propose()

    assert not ADAPTATION_PASSED_THROUGH & set(committed)
    assert list(Adaptation.objects.values_list("state", flat=True)) == (
        [S.AWAITING_APPROVAL] if waiting else []
    )


def test_a_refused_approval_leaves_the_adaptation_where_it_waits(
    stage: Stage, committed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = stage.waiting()
    with monkeypatch.context() as drifted:
        drifted.setattr(acts, "evidence_drift", lambda _: 2.0)
        with pytest.raises(Problem, match="drifted"):
            approve(stage, waiting)

    Adaptation.objects.update(deadline_at=timezone.now() - timedelta(seconds=1))
    with pytest.raises(Problem, match="deadline"):
        approve(stage, waiting)

    assert set(committed) == {S.AWAITING_APPROVAL}


def test_proposal_and_approval_have_an_audit_row_and_no_event(stage: Stage) -> None:
    adaptation = approve(stage, stage.waiting())

    acts_of = AuditEvent.objects.filter(object_uid=adaptation.uid).order_by("id")
    assert list(acts_of.values_list("act", flat=True)) == [
        "adaptation.proposed",
        "adaptation.awaiting_approval",
        "adaptation.approved",
        "adaptation.compile_queued",
    ]
    events = FeedEvent.objects.filter(type="adaptation.changed").order_by("id")
    for topic in (f"run:{stage.run.uid}", "inbox"):
        assert [event.data["to"] for event in events.filter(topic=topic)] == [
            "awaiting_approval",
            "compile_queued",
        ]
