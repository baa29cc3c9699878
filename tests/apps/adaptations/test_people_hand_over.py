"""Edit and approve, a second vote, reason codes, assign, snooze, escalate, and the dry run."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from apps.accounts.models import User
from apps.adaptations import services
from apps.adaptations.binding import shown_hash
from apps.adaptations.models import Adaptation, Snooze
from apps.adaptations.selectors import in_inbox_of, snoozed_by
from apps.audit.models import AuditEvent
from apps.blueprints.models import Blueprint
from apps.policies.models import PolicyVersion
from apps.policies.services import current_policy, publish_policy
from apps.rest.problems import Problem
from apps.runs.models import Command, Run
from esper.contracts import AdaptationKind, AdaptationState, RejectReason, RunMode
from tests.apps.adaptations.test_remedies_as_adaptations import propose
from tests.apps.callers import Caller
from tests.apps.cast import make_person, make_remedies, token_of
from tests.apps.stage import Stage

S = AdaptationState
pytestmark = pytest.mark.django_db
BOTH = pytest.mark.parametrize("kind", list(AdaptationKind))


def _waiting(stage: Stage, kind: AdaptationKind) -> Adaptation:
    if kind == AdaptationKind.GRAFT:
        return stage.waiting(config={"rank": 8, "bias": True})
    make_remedies()
    Run.objects.filter(pk=stage.run.pk).update(mode=RunMode.SUPERVISED)
    stage.run.refresh_from_db()
    return propose(stage)  # set_lr, factor 0.5


def _approve(user: User, adaptation: Adaptation, **changes: Any) -> Adaptation:
    adaptation.refresh_from_db()
    wanted = {
        "user": user,
        "via": "",
        "version": adaptation.version,
        "evidence_hash": adaptation.evidence_hash,
        "reason": "needed",
        **changes,
    }
    return services.approve_adaptation(adaptation=adaptation, **wanted)


def _refused(user: User, adaptation: Adaptation, **changes: Any) -> tuple[int, str, str]:
    with pytest.raises(Problem) as refused:
        _approve(user, adaptation, **changes)
    return refused.value.status, refused.value.code, str(refused.value)


EDITS = {
    AdaptationKind.GRAFT: ({"rank": 4}, {"rank": [8, 4]}, {"rank": 4, "bias": True}),
    AdaptationKind.REMEDY: ({"factor": 0.8}, {"factor": [0.5, 0.8]}, {"factor": 0.8}),
}


@BOTH
def test_what_the_approver_changed_is_checked_sent_and_named(
    stage: Stage, kind: AdaptationKind
) -> None:
    adaptation = _waiting(stage, kind)
    before = adaptation.evidence_hash
    changes, named, wanted = EDITS[kind]
    approved = _approve(stage.operator, adaptation, config=changes)
    assert (approved.edited, approved.config) == (named, wanted)
    assert approved.evidence_hash == shown_hash(approved) != before
    if kind == AdaptationKind.REMEDY:
        assert approved.in_words == "Multiply the learning rate by 0.8"
        command = Command.objects.get(adaptation_uid=approved.uid)
        assert command.payload["config"] == wanted
    else:
        assert approved.job is not None
        assert approved.job.config == wanted
    row = AuditEvent.objects.get(act="adaptation.edited")
    assert (row.actor, row.data["after"]) == ("olga", changes)
    receipt = services.attestation_of(approved)
    assert receipt["shown"]["edited"] == named
    assert receipt["event"]["data"]["evidence_hash"] == approved.evidence_hash


WRONG = {
    AdaptationKind.GRAFT: [{"rank": 9}, {"rank": 0}, {"rank": 2.5}, {"rank": "4"}, {"depth": 1}],
    AdaptationKind.REMEDY: [{"factor": "low"}, {"factor": True}, {"speed": 1}],
}


@BOTH
def test_a_setting_that_does_not_fit_changes_nothing(stage: Stage, kind: AdaptationKind) -> None:
    adaptation = _waiting(stage, kind)
    before = (adaptation.config, adaptation.version, adaptation.evidence_hash)
    for changes in WRONG[kind]:
        assert _refused(stage.operator, adaptation, config=changes)[:2] == (422, "invalid")
    adaptation.refresh_from_db()
    assert (adaptation.config, adaptation.version, adaptation.evidence_hash) == before


@BOTH
def test_an_edited_adaptation_passes_the_gates_of_today(stage: Stage, kind: AdaptationKind) -> None:
    adaptation = _waiting(stage, kind)
    Run.objects.filter(pk=stage.run.pk).update(last_seen_at=timezone.now() - timedelta(minutes=3))
    status, code, text = _refused(stage.operator, adaptation, config=EDITS[kind][0])
    assert (status, code) == (409, "gate-closed")
    assert "180 s old" in text
    adaptation.refresh_from_db()
    assert (adaptation.state, adaptation.edited) == (S.AWAITING_APPROVAL, {})


def _two_votes(stage: Stage) -> None:
    policy = current_policy()
    values = {**policy.values, "approvals_for_high_risk": 2}
    PolicyVersion.objects.create(version=policy.version + 1, values=values, reason="two")
    Blueprint.objects.update(risk="high")


def test_a_high_risk_takes_two_different_people_where_the_policy_says_so(stage: Stage) -> None:
    _two_votes(stage)
    adaptation = stage.waiting()
    assert _approve(stage.operator, adaptation).state == S.AWAITING_APPROVAL
    assert services.votes_of(adaptation) == {"needed": 2, "by": ["olga"]}
    assert _refused(stage.operator, adaptation)[:2] == (409, "already-voted")
    assert _approve(stage.second, adaptation).state == S.COMPILE_QUEUED
    acts = AuditEvent.objects.filter(object_uid=adaptation.uid).values_list("actor", "act")
    assert ("olga", "adaptation.voted") in acts
    assert ("oscar", "adaptation.approved") in acts


def test_a_vote_counts_for_what_was_shown_only(stage: Stage) -> None:
    _two_votes(stage)
    adaptation = stage.waiting()
    _approve(stage.operator, adaptation)
    edited = _approve(stage.second, adaptation, config={"rank": 2})  # another graft than olga saw
    assert (edited.state, services.votes_of(edited)["by"]) == (S.AWAITING_APPROVAL, ["oscar"])
    assert _approve(stage.operator, adaptation).state == S.COMPILE_QUEUED


def test_without_such_a_policy_one_person_is_enough(stage: Stage) -> None:
    Blueprint.objects.update(risk="high")
    assert _approve(stage.operator, stage.waiting()).state == S.COMPILE_QUEUED


def test_a_policy_that_nobody_can_satisfy_is_not_published(stage: Stage) -> None:
    curator = make_person("carl")
    with pytest.raises(Problem) as refused:
        publish_policy(changes={"approvals_for_high_risk": 3}, reason="care", user=curator, via="")
    assert refused.value.code == "quorum-unreachable"
    assert "there are 2 who may" in str(refused.value)
    published = publish_policy(
        changes={"approvals_for_high_risk": 2}, reason="care", user=curator, via=""
    )
    assert published.safety_policy().approvals_for_high_risk == 2


@BOTH
@pytest.mark.parametrize("code", ["", *RejectReason])
def test_a_rejection_has_a_code_or_words(stage: Stage, kind: AdaptationKind, code: str) -> None:
    adaptation = _waiting(stage, kind)
    caller = Caller(token_of(stage.operator, "read", "act"))  # type: ignore[arg-type]
    path = f"adaptations/{adaptation.uid}/reject"
    answer = caller.act(path, {"reason_code": code}, version=adaptation.version)
    if code in ("", "other"):
        assert (answer.status, answer.code) == (422, "reason-required")
        return
    assert (answer.status, answer.data["rejected_for"]) == (200, code)
    row = AuditEvent.objects.get(act="adaptation.rejected")
    assert row.reason == code.replace("_", " ")


def test_an_adaptation_is_assigned_to_somebody_who_may_approve_it(stage: Stage) -> None:
    adaptation = stage.waiting()
    caller = Caller(token_of(stage.operator, "read", "act"))  # type: ignore[arg-type]
    path = f"adaptations/{adaptation.uid}/assign"
    for nobody in ("vera", "rafi", "nemo"):  # a viewer, the owner, no account
        answer = caller.act(path, {"to": nobody}, version=adaptation.version)
        assert (answer.status, answer.code) == (422, "invalid")
    answer = caller.act(path, {"to": "oscar"}, version=adaptation.version)
    assert (answer.status, answer.data["assigned_to"]) == (200, "oscar")
    row = AuditEvent.objects.get(act="adaptation.assigned")
    assert (row.actor, row.data["to"]) == ("olga", "oscar")
    back = caller.act(path, {"to": ""}, version=answer.data["version"])
    assert back.data["assigned_to"] is None


def test_a_snooze_hides_it_from_one_person_for_some_minutes(stage: Stage) -> None:
    adaptation = stage.waiting()
    version = adaptation.version
    caller = Caller(token_of(stage.operator, "read", "act"))  # type: ignore[arg-type]
    path = f"adaptations/{adaptation.uid}/snooze"
    too_long = caller.post(path, {"minutes": 60})  # it expires after 15
    assert (too_long.status, too_long.code) == (422, "invalid")
    assert caller.post(path, {"minutes": 5}).status == 200
    adaptation.refresh_from_db()
    assert adaptation.version == version
    assert list(in_inbox_of(stage.operator)) == []
    assert list(snoozed_by(stage.operator)) == list(in_inbox_of(stage.second)) == [adaptation]
    Snooze.objects.update(until=timezone.now())
    assert list(in_inbox_of(stage.operator)) == [adaptation]
    assert caller.post(path, {"minutes": 5}).status == 200
    assert caller.post(path, {"minutes": 0}).status == 200
    assert list(in_inbox_of(stage.operator)) == [adaptation]


def test_an_escalated_adaptation_is_approved_by_an_admin(stage: Stage) -> None:
    adaptation = stage.waiting()

    def escalate(user: User, reason: str) -> Adaptation:
        adaptation.refresh_from_db()
        return services.escalate_adaptation(
            adaptation=adaptation, user=user, via="", version=adaptation.version, reason=reason
        )

    for reason, code in (("", "reason-required"), ("unsure", "quorum-unreachable")):
        with pytest.raises(Problem) as refused:  # at first there is no admin
            escalate(stage.operator, reason)
        assert refused.value.code == code
    admin = make_person("ada")
    assert escalate(stage.operator, "unsure").escalated_by == stage.operator
    with pytest.raises(Problem) as refused:
        escalate(stage.second, "me too")
    assert refused.value.code == "already-escalated"
    assert _refused(stage.second, adaptation)[:2] == (403, "escalated")
    assert services.permissions(adaptation, stage.second)["reject"].allowed
    assert _approve(admin, adaptation).state == S.COMPILE_QUEUED


@BOTH
def test_a_dry_run_says_what_would_be_done_and_changes_nothing(
    stage: Stage, kind: AdaptationKind
) -> None:
    adaptation = _waiting(stage, kind)
    caller = Caller(token_of(stage.operator, "read", "act"))  # type: ignore[arg-type]
    events = AuditEvent.objects.count()
    answer = caller.get(f"adaptations/{adaptation.uid}/dry-run")
    assert answer.status == 200, answer.data
    assert answer.data["permission"]["allowed"]
    assert not [check for check in answer.data["checks"] if not check["passed"] and check["hard"]]
    assert {"run_mode", "evidence"} <= {check["rule"] for check in answer.data["checks"]}
    first = "A kernel" if kind == AdaptationKind.GRAFT else "A signed command"
    assert answer.data["steps"][0].startswith(first)
    after = Adaptation.objects.get(pk=adaptation.pk)
    assert (after.version, after.state) == (adaptation.version, S.AWAITING_APPROVAL)
    assert (AuditEvent.objects.count(), Command.objects.count()) == (events, 0)
