"""Standing delegations: approvals that are given ahead, with limits and for a time."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from apps.accounts.models import User
from apps.adaptations import services
from apps.adaptations.models import Adaptation, Delegation
from apps.audit.models import AuditEvent
from apps.policies.services import adaptation_switch, publish_policy
from apps.rest.problems import Problem
from apps.runs.models import Command, Run
from esper.contracts import AdaptationState, RunMode, TokenScope
from tests.apps.adaptations.test_remedies_as_adaptations import FINDING, propose, set_mode
from tests.apps.callers import Caller
from tests.apps.cast import force_state, make_person, make_remedies, token_of
from tests.apps.stage import Stage

S = AdaptationState


@pytest.fixture(autouse=True)
def _catalogue(db: None, stage: Stage) -> None:
    make_remedies()
    set_mode(stage, RunMode.SUPERVISED)


def grant(stage: Stage, user: User | None = None, **changes: Any) -> Delegation:
    wanted: dict[str, Any] = {
        "remedy": "set_lr",
        "limits": {"factor": [0.5, 2.0]},
        "minutes": 60,
        "most_uses": 3,
        "reason": "a run over night",
        **changes,
    }
    return services.grant_delegation(
        run=stage.run, user=user or stage.operator, via="session", **wanted
    )


def again(stage: Stage, key: str, **changes: Any) -> Adaptation:
    """A later proposal, for another kind of finding, so that neither gate of pace closes."""
    Adaptation.objects.filter(run=stage.run, remedy="set_lr").update(finding=f"over_{key}")
    return propose(stage, key=key, **changes)


def test_a_covered_remedy_goes_without_a_person_and_names_who_allowed_it(stage: Stage) -> None:
    delegation = grant(stage)
    adaptation = propose(stage)
    assert adaptation.state == S.DISPATCHED
    assert Command.objects.get(adaptation_uid=adaptation.uid).payload["config"] == {"factor": 0.5}
    assert (adaptation.delegation, adaptation.decided_by) == (delegation, None)
    assert adaptation.decided_rule.startswith(f"delegation {delegation.number} of olga: ")
    assert "factor from 0.5 to 2" in adaptation.decided_rule
    granted = AuditEvent.objects.get(act="delegation.granted")
    assert (granted.actor, granted.reason) == ("olga", "a run over night")
    assert granted.data["limits"] == {"factor": [0.5, 2.0]}
    approved = AuditEvent.objects.get(act="adaptation.approved")
    assert (approved.actor_kind, approved.actor) == ("rule", "delegation of olga")


def _expire(_: Stage, delegation: Delegation) -> None:
    Delegation.objects.filter(pk=delegation.pk).update(until=timezone.now() - timedelta(seconds=1))


def _revoke(stage: Stage, delegation: Delegation) -> None:
    services.revoke_delegation(delegation=delegation, user=stage.second, via="", reason="enough")


def _use_up(_: Stage, delegation: Delegation) -> None:
    Delegation.objects.filter(pk=delegation.pk).update(most_uses=0)


def _demote(stage: Stage, _: Delegation) -> None:
    User.objects.filter(pk=stage.operator.pk).update(role="viewer")


def _hand_the_run_over(stage: Stage, delegation: Delegation) -> None:
    Run.objects.filter(pk=stage.run.pk).update(owner=delegation.granted_by)


def _stricter_policy(stage: Stage, _: Delegation) -> None:
    publish_policy(
        changes={"max_adaptations_per_day": 0},
        reason="no more today",
        user=make_person("carl"),
        via="",
    )


@pytest.mark.parametrize(
    "ended", [_expire, _revoke, _use_up, _demote, _hand_the_run_over, _stricter_policy]
)
def test_it_allows_nothing_once_it_is_over_or_the_policy_or_a_right_has_changed(
    stage: Stage, ended: Callable[[Stage, Delegation], None]
) -> None:
    ended(stage, grant(stage))
    stage.run.refresh_from_db()
    adaptation = propose(stage)
    assert (adaptation.state, adaptation.delegation) == (S.AWAITING_APPROVAL, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"factor": 0.4}},
        {"config": {"factor": 2.5}},
        {"remedy": "clip_layer", "layer": "fc", "config": {}},
        {"asks": ("the loss of the last steps is not known.",)},
    ],
    ids=["below", "above", "another remedy", "the trainer asks"],
)
def test_what_it_does_not_cover_waits_for_a_person(stage: Stage, changes: dict[str, Any]) -> None:
    grant(stage)
    assert propose(stage, **changes).state == S.AWAITING_APPROVAL


def test_factors_of_all_uses_together_stay_inside_the_limits(stage: Stage) -> None:
    grant(stage)
    assert propose(stage, config={"factor": 0.6}).state == S.DISPATCHED
    _end_all(stage)
    assert again(stage, "k2", config={"factor": 0.6}).state == S.AWAITING_APPROVAL  # 0.36 in all
    _end_all(stage)
    assert again(stage, "k3", config={"factor": 0.9}).state == S.DISPATCHED  # 0.54 in all


def _end_all(stage: Stage) -> None:
    for row in Adaptation.objects.filter(run=stage.run, ended_at=None):
        force_state(row, S.NOT_APPLIED, ended_at=timezone.now())


def test_it_stops_with_the_switch(stage: Stage) -> None:
    grant(stage)
    services.set_adaptation_switch(on=False, user=stage.operator, via="")
    assert not adaptation_switch().on
    with pytest.raises(Problem) as closed:
        propose(stage)
    assert closed.value.code == "gate-closed"
    assert not Command.objects.filter(adaptation_uid__gt="").exists()


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"remedy": "restore_best", "limits": {}}, 422, "not-delegable"),  # the catalogue asks
        ({"remedy": "rewind", "limits": {}}, 422, "not-delegable"),  # above the policy's risk
        ({"remedy": "evaluate_now", "limits": {}}, 422, "not-delegable"),  # it changes nothing
        ({"remedy": "no_such"}, 422, "unknown-remedy"),
        ({"limits": {"speed": [1, 2]}}, 422, "invalid"),
        ({"limits": {"factor": [2, 1]}}, 422, "invalid"),
        ({"limits": {"factor": [1]}}, 422, "invalid"),
        ({"limits": {"factor": [True, 2]}}, 422, "invalid"),
        ({"reason": " "}, 422, "reason-required"),
    ],
)
def test_a_delegation_is_never_wider_than_the_policy(
    stage: Stage, changes: dict[str, Any], status: int, code: str
) -> None:
    with pytest.raises(Problem) as refused:
        grant(stage, **changes)
    assert (refused.value.status, refused.value.code) == (status, code)
    assert not Delegation.objects.exists()


def test_nobody_delegates_for_their_own_run_and_a_viewer_not_at_all(stage: Stage) -> None:
    for person, code in ((stage.owner, "self-approval"), (stage.viewer, "not-eligible")):
        with pytest.raises(Problem) as refused:
            grant(stage, user=person)
        assert refused.value.code == code


def test_over_the_api_it_is_granted_listed_and_revoked_once(stage: Stage) -> None:
    caller = Caller(token_of(stage.operator, TokenScope.ACT))
    path = f"runs/{stage.run.uid}/delegations"
    body = {"remedy": "set_lr", "limits": {"factor": [0.5, 2]}, "minutes": 30, "reason": "night"}
    made = caller.post(path, body)
    assert made.status == 201
    assert caller.post(path, {**body, "minutes": 24 * 60 + 1}).status == 400
    propose(stage)
    (row,) = caller.get(path).data["results"]
    assert (row["uid"], row["used"], row["granted_by"]) == (made.data["uid"], 1, "olga")
    owner = Caller(token_of(stage.owner, TokenScope.ACT))  # the owner may always take it back
    assert owner.post(f"delegations/{row['uid']}/revoke", {"reason": "mine"}).status == 200
    assert owner.post(f"delegations/{row['uid']}/revoke").status == 409
    assert AuditEvent.objects.get(act="delegation.revoked").actor == stage.owner.get_username()
    assert FINDING.slug == Adaptation.objects.get().finding
