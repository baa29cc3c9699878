"""Role × act over the real endpoints: the API uses the one policy table, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
from django.core.cache import cache
from django.db import OperationalError, transaction
from django.db.models import QuerySet
from django.utils import timezone

from apps.accounts.models import User
from apps.accounts.policy import ALLOWED, Act, may
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.blueprints.models import Variant
from apps.violations.models import Violation
from apps.violations.services import record_violation
from apps.workers.services import Presence, heartbeat
from esper.contracts import (
    AdaptationState,
    LaunchState,
    Role,
    Severity,
    TokenScope,
    ViolationRule,
    WorkerKind,
)
from tests.apps.callers import Answer, Caller, Inbox, register, registration, shown
from tests.apps.cast import force_state, make_remedies, token_of
from tests.apps.recipes.rows import make_launch, make_recipe

pytestmark = pytest.mark.django_db

Attempt = Callable[[Caller, Inbox], Answer]


def _on_adaptation(
    name: str, reason: str = "because", more: Callable[[Adaptation], dict[str, str]] = lambda _: {}
) -> Attempt:
    def attempt(caller: Caller, inbox: Inbox) -> Answer:
        adaptation = inbox.waiting()
        if name == "rollback":
            force_state(adaptation, AdaptationState.PROBATION, graft_step=1001)
        path = f"adaptations/{adaptation.uid}/{name}"
        return caller.act(path, {"reason": reason} | more(adaptation), version=adaptation.version)

    return attempt


def _snooze(caller: Caller, inbox: Inbox) -> Answer:
    return caller.post(f"adaptations/{inbox.waiting().uid}/snooze", {"minutes": 5})


def _withdraw_variant(caller: Caller, inbox: Inbox) -> Answer:
    blueprint = inbox.waiting().grafted_blueprint
    variant = Variant.objects.create(blueprint=blueprint, factors={"rank": 2.0}, key="rank × 2")
    return caller.post(f"variants/{variant.uid}/withdraw", {"reason": "worse"})


def _on_run(name: str) -> Attempt:
    return lambda caller, inbox: caller.post(f"{inbox.trainer.path}/{name}", {"reason": "hm"})


def _ask_for_remedy(caller: Caller, inbox: Inbox) -> Answer:
    make_remedies()
    return caller.post(f"{inbox.trainer.path}/ask-for-remedy", {"remedy": "skip_update"})


def _shadow(caller: Caller, inbox: Inbox) -> Answer:
    return caller.post(f"adaptations/{inbox.waiting().uid}/shadow", {"reason": "hm"})


def _delegate(caller: Caller, inbox: Inbox) -> Answer:
    make_remedies()
    body = {"remedy": "set_lr", "limits": {"factor": [0.5, 2]}, "minutes": 5, "reason": "night"}
    return caller.post(f"{inbox.trainer.path}/delegations", body)


def _on_launch(name: str, state: LaunchState) -> Attempt:
    def attempt(caller: Caller, inbox: Inbox) -> Answer:
        launch = make_launch(inbox.trainer.row().owner, state=state)
        return caller.post(f"launches/{launch.uid}/{name}", {"reason": "hm"})

    return attempt


def start_counter(caller: Caller) -> Answer:
    recipe = make_recipe()
    body = {"host": recipe.host, "recipe": recipe.slug, "digest": recipe.digest}
    return caller.post("launches", {**body, "parameters": {"steps": 500}})


def _acknowledge(caller: Caller, inbox: Inbox) -> Answer:
    violation = record_violation(
        run=inbox.trainer.row(),
        rule=ViolationRule.COMMAND,
        severity=Severity.INFO,
        observed="x",
        limit="y",
        text="z",
        action="none",
    )
    return caller.post(f"violations/{violation.uid}/acknowledge", {"reason": "seen"})


def _on_worker(name: str) -> Attempt:
    def attempt(caller: Caller, _: Inbox) -> Answer:
        heartbeat(Presence("compile@here", WorkerKind.COMPILE, "here", started_at=timezone.now()))
        return caller.post(f"workers/compile@here/{name}", {"reason": "maintenance"})

    return attempt


ACTS: list[tuple[str, Act, Attempt]] = [
    ("approve", Act.APPROVE, _on_adaptation("approve", more=shown)),
    ("reject", Act.REJECT, _on_adaptation("reject")),
    ("claim", Act.CLAIM, _on_adaptation("claim")),
    ("release", Act.CLAIM, _on_adaptation("release")),
    ("assign", Act.CLAIM, _on_adaptation("assign", more=lambda _: {"to": ""})),
    ("escalate", Act.CLAIM, _on_adaptation("escalate")),
    ("snooze", Act.CLAIM, _snooze),
    ("extend", Act.EXTEND, _on_adaptation("extend")),
    ("cancel", Act.CANCEL, _on_adaptation("cancel")),
    ("rollback", Act.ROLL_BACK, _on_adaptation("rollback")),
    ("shadow", Act.SHADOW, _shadow),
    ("delegate", Act.APPROVE, _delegate),
    ("ask for a remedy", Act.PROPOSE_REMEDY, _ask_for_remedy),
    ("pause", Act.PAUSE_ADAPTATION, _on_run("pause-adaptation")),
    ("resume", Act.PAUSE_ADAPTATION, _on_run("resume-adaptation")),
    ("stop", Act.STOP_RUN, _on_run("stop")),
    ("kill", Act.KILL, lambda c, _: c.post("adaptation-switch", {"on": False, "reason": "!"})),
    ("acknowledge", Act.ACKNOWLEDGE_VIOLATION, _acknowledge),
    ("drain", Act.MANAGE_WORKERS, _on_worker("drain")),
    ("quarantine", Act.MANAGE_WORKERS, _on_worker("quarantine")),
    ("release worker", Act.MANAGE_WORKERS, _on_worker("release")),
    (
        "disable",
        Act.SWITCH_BLUEPRINT,
        lambda c, _: c.post("blueprints/proj_lora_64/disable", {"reason": "bad"}),
    ),
    (
        "enable",
        Act.SWITCH_BLUEPRINT,
        lambda c, _: c.post("blueprints/proj_lora_64/enable", {"reason": ""}),
    ),
    ("withdraw a variant", Act.ADMIT_VARIANT, _withdraw_variant),
    (
        "policy",
        Act.EDIT_POLICY,
        lambda c, _: c.post("policies", {"changes": {"confidence_auto": 0.8}, "reason": "x"}),
    ),
    ("scrub", Act.MANAGE_CACHE, lambda c, _: c.post("kernels/cache/scrub", {"reason": "hm"})),
    ("register", Act.CREATE_RUN, lambda c, _: c.post("runs", registration(name="another"))),
    ("start", Act.START_RECIPE, lambda c, _: start_counter(c)),
    ("resume-launch", Act.START_RECIPE, _on_launch("resume", LaunchState.STOPPED)),
    ("stop-launch", Act.STOP_LAUNCH, _on_launch("stop", LaunchState.RUNNING)),
    ("audit", Act.VIEW_AUDIT, lambda c, _: c.get("audit")),
    ("read", Act.VIEW, lambda c, _: c.get("adaptations")),
]


def test_every_act_of_the_policy_is_tried() -> None:
    assert {act for _, act, _ in ACTS} == set(Act) - {Act.MANAGE_PEOPLE}  # that one is the admin's


@contextmanager
def undone() -> Iterator[None]:
    """What one role does here, the next one does not find: to set all up again takes longer."""
    with transaction.atomic():
        yield
        transaction.set_rollback(True)
    cache.clear()


def test_each_role_does_what_the_table_says_and_nothing_else(
    callers: dict[Role, Caller],
    people: dict[Role, User],
    inbox: Inbox,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting = inbox.waiting().pk
    monkeypatch.setattr(inbox, "waiting", lambda: Adaptation.objects.get(pk=waiting))
    for (name, act, attempt), role in product(ACTS, Role):
        with undone():
            known = set(AuditEvent.objects.values_list("pk", flat=True))
            expected = may(people[role], act, of=inbox.trainer.row())
            answer = attempt(callers[role], inbox)
            if expected.allowed:
                assert answer.status < 300, (name, role, answer.data)
                continue
            assert (answer.status, answer.code) == (403, expected.code), (name, role)
            assert answer.data["detail"] == expected.why, (name, role)
            acts = AuditEvent.objects.exclude(pk__in=known)
            assert not acts.filter(actor=people[role].get_username()).exists(), (name, role)


def test_nobody_approves_an_adaptation_of_their_own_run(
    people: dict[Role, User], callers: dict[Role, Caller], inbox: Inbox
) -> None:
    assert Role.OPERATOR in ALLOWED[Act.APPROVE]
    run = inbox.trainer.row()
    run.owner = people[Role.OPERATOR]
    run.save()
    adaptation = inbox.waiting()
    path = f"adaptations/{adaptation.uid}/approve"
    refused = callers[Role.OPERATOR].act(path, shown(adaptation), version=adaptation.version)
    assert (refused.status, refused.code) == (403, "self-approval")
    assert (
        callers[Role.ADMIN].act(path, shown(adaptation), version=adaptation.version).status == 200
    )


@pytest.mark.parametrize("scope", [TokenScope.READ, TokenScope.RUNS_CREATE])
def test_a_token_without_the_scope_cannot_do_what_its_owner_may(
    scope: TokenScope, people: dict[Role, User], inbox: Inbox
) -> None:
    adaptation = inbox.waiting()
    caller = Caller(token_of(people[Role.OPERATOR], scope))
    refused = caller.act(
        f"adaptations/{adaptation.uid}/approve", shown(adaptation), version=adaptation.version
    )
    assert (refused.status, refused.code) == (403, "insufficient-scope")
    adaptation.refresh_from_db()
    assert adaptation.state == AdaptationState.AWAITING_APPROVAL


def test_the_token_of_a_disabled_account_is_refused(
    people: dict[Role, User], operator: Caller
) -> None:
    assert operator.get("me").status == 200
    person = people[Role.OPERATOR]
    person.is_active = False
    person.save()
    assert (operator.get("me").status, operator.get("me").code) == (401, "not-signed-in")


def test_people_issue_and_revoke_tokens_for_their_scripts(operator: Caller) -> None:
    made = operator.post("tokens", {"name": "script", "scopes": ["read"], "expires_in_days": 7})
    assert made.status == 201
    script = Caller(made.data["secret"])
    assert script.get("me").data["username"] == "olga"
    assert "secret" not in operator.get("tokens").data["results"][0]
    grab = operator.post("tokens", {"name": "tamiyo?", "scopes": ["decide"]})
    assert (grab.status, grab.code) == (400, "invalid")
    assert script.delete(f"tokens/{made.data['uid']}").code == "insufficient-scope"
    assert operator.delete(f"tokens/{made.data['uid']}").status == 204
    assert script.get("me").status == 401


def test_a_token_reads_while_the_database_takes_no_write(
    operator: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a token was used is written at its first use in a minute."""

    def locked(*_: Any, **__: Any) -> int:
        raise OperationalError("database is locked")

    monkeypatch.setattr(QuerySet, "update", locked)
    assert operator.get("me").data["username"] == "olga"


def test_a_token_issued_with_a_token_does_not_outlive_it(operator: Caller) -> None:
    ends_soon = {"name": "script", "scopes": ["read", "act"], "expires_in_days": 2}
    script = Caller(operator.post("tokens", ends_soon).data["secret"])
    child = script.post("tokens", {"name": "child", "scopes": ["read"], "expires_in_days": 300})
    assert child.status == 201
    parent = next(t for t in operator.get("tokens").data["results"] if t["name"] == "script")
    assert child.data["expires_at"] == parent["expires_at"]


def test_nobody_revokes_the_token_of_somebody_else(
    callers: dict[Role, Caller], people: dict[Role, User]
) -> None:
    trainer = register(people[Role.RESEARCHER])
    uid = people[Role.RESEARCHER].tokens.latest("id").uid
    refused = callers[Role.ADMIN].delete(f"tokens/{uid}")
    assert (refused.status, refused.code) == (404, "not-found")
    assert trainer.get(trainer.path).status == 200


def test_me_lists_what_i_may_do(callers: dict[Role, Caller]) -> None:
    viewer, curator = callers[Role.VIEWER].get("me").data, callers[Role.CURATOR].get("me").data
    assert viewer["may"] == ["view", "view_audit"]
    assert "edit_policy" in curator["may"]
    assert "approve" not in curator["may"]


def test_violations_are_acknowledged_by_one_person(
    callers: dict[Role, Caller], inbox: Inbox
) -> None:
    _acknowledge(callers[Role.OPERATOR], inbox)
    violation = Violation.objects.get()
    again = callers[Role.ADMIN].post(f"violations/{violation.uid}/acknowledge")
    assert (again.status, again.code) == (409, "already-acknowledged")
    assert "olga" in again.data["detail"]
