"""A freeze: nothing is applied in it, whoever or whatever wants to; what is safe goes on."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from apps.accounts.models import Project, User
from apps.adaptations import compiled_kernels, services
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.policies.freezing import end_freeze, set_freeze
from apps.policies.models import Freeze
from apps.policies.selectors import freeze_over
from apps.rest.problems import Problem
from apps.runs.models import Command, Run
from esper.contracts import AdaptationState, CommandKind, Role, RunMode, TokenScope
from tests.apps.adaptations.test_remedies_as_adaptations import propose, set_mode
from tests.apps.callers import Caller
from tests.apps.cast import make_person, make_remedies, token_of
from tests.apps.stage import Stage

S = AdaptationState
HOUR = timedelta(hours=1)
CHANGES = {CommandKind.GRAFT, CommandKind.REMEDY, CommandKind.SPEED_UP}


@pytest.fixture(autouse=True)
def _catalogue(db: None) -> None:
    make_remedies()


@pytest.fixture
def carl(db: None) -> User:
    return make_person("carl")


def freeze(carl: User, **changes: Any) -> Freeze:
    wanted = {"ends_at": timezone.now() + HOUR, "reason": "the paper is due", **changes}
    return set_freeze(user=carl, via="session", **wanted)


def approve(adaptation: Adaptation, user: User, **changes: Any) -> Adaptation:
    adaptation.refresh_from_db()
    return services.approve_adaptation(
        adaptation=adaptation,
        user=user,
        via="session",
        version=adaptation.version,
        evidence_hash=adaptation.evidence_hash,
        **changes,
    )


def sent(stage: Stage) -> set[str]:
    """Kinds of the commands that change the run."""
    return {c.kind for c in Command.objects.filter(run=stage.run) if c.kind in CHANGES}


# --- before, in it, after ----------------------------------------------------------------------


def test_an_approval_is_refused_with_the_end_and_takes_effect_afterwards(
    stage: Stage, carl: User
) -> None:
    adaptation = stage.waiting()
    window = freeze(carl)
    asks = Caller(token_of(stage.operator, TokenScope.ACT))
    body = {"evidence_hash": adaptation.evidence_hash}
    path = f"adaptations/{adaptation.uid}"
    refused = asks.act(f"{path}/approve", body, version=adaptation.version)
    assert (refused.status, refused.code) == (409, "freeze")
    assert refused.data["until"] == window.ends_at.isoformat()
    assert window.ends_at.strftime("%Y-%m-%d %H:%M:%S UTC") in refused.data["detail"]
    assert "the paper is due" in refused.data["detail"]
    assert refused.data["title"]
    shown = asks.get(path).data["permissions"]
    assert not shown["approve"]["allowed"]
    assert "until" in shown["approve"]["why"]
    assert shown["reject"]["allowed"]
    adaptation.refresh_from_db()
    assert adaptation.state == S.AWAITING_APPROVAL
    end_freeze(freeze=window, user=carl, via="session", reason="accepted")
    assert approve(adaptation, stage.operator).state == S.COMPILE_QUEUED


def test_the_start_belongs_to_it_and_the_end_does_not(
    stage: Stage, carl: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = timezone.now() + HOUR
    window = freeze(carl, starts_at=start, ends_at=start + HOUR)
    tick = timedelta(microseconds=1)
    for now, over in (
        (start - tick, False),
        (start, True),
        (start + HOUR - tick, True),
        (start + HOUR, False),
    ):
        monkeypatch.setattr("apps.policies.selectors.database_now", lambda now=now: now)
        assert (freeze_over(stage.run.project_id) == window) is over, now


def test_of_several_the_one_that_ends_last_is_named(stage: Stage, carl: User) -> None:
    freeze(carl, ends_at=timezone.now() + 3 * HOUR, reason="long")
    freeze(carl, project=stage.run.project, reason="short")
    found = freeze_over(stage.run.project_id)
    assert found is not None
    assert found.reason == "long"


# --- over kinds: who would apply something -------------------------------------------------------


def _graft_by_rule(stage: Stage) -> Adaptation:
    return stage.propose()


def _remedy_by_rule(stage: Stage) -> Adaptation:
    return propose(stage)


def _remedy_by_delegation(stage: Stage) -> Adaptation:
    set_mode(stage, RunMode.SUPERVISED)
    services.grant_delegation(
        run=stage.run,
        user=stage.operator,
        via="",
        remedy="set_lr",
        limits={"factor": [0.1, 2.0]},
        minutes=60,
        most_uses=3,
        reason="over night",
    )
    return propose(stage)


def _remedy_by_a_person(stage: Stage) -> Adaptation:
    return services.ask_for_remedy(
        run=stage.run,
        user=stage.operator,
        via="",
        remedy="set_lr",
        layer="",
        config={"factor": 0.5},
        reason="too fast",
    )


WANTED: list[Callable[[Stage], Adaptation]] = [
    _graft_by_rule,
    _remedy_by_rule,
    _remedy_by_delegation,
    _remedy_by_a_person,
]


@pytest.mark.parametrize("want", WANTED)
def test_in_a_freeze_it_waits_for_a_person_and_else_it_goes(
    stage: Stage, carl: User, want: Callable[[Stage], Adaptation]
) -> None:
    window = freeze(carl)
    adaptation = want(stage)
    assert adaptation.state == S.AWAITING_APPROVAL
    assert any("a freeze everywhere lasts until" in line for line in adaptation.asks)
    assert sent(stage) == set()
    with pytest.raises(Problem) as refused:
        approve(adaptation, stage.second, reason="now")
    assert refused.value.code == "freeze"
    assert sent(stage) == set()
    end_freeze(freeze=window, user=carl, via="", reason="")
    assert approve(adaptation, stage.second).state in (S.COMPILE_QUEUED, S.DISPATCHED)


@pytest.mark.parametrize("want", WANTED)
def test_without_a_freeze_the_same_goes_at_once(
    stage: Stage, want: Callable[[Stage], Adaptation]
) -> None:
    assert want(stage).state in (S.COMPILE_QUEUED, S.DISPATCHED)


def test_what_was_approved_before_is_not_sent_in_it(stage: Stage, carl: User) -> None:
    adaptation = approve(stage.waiting(), stage.operator)
    compiled = stage.compiled(adaptation)
    freeze(carl)
    services.dispatch_adaptation(compiled.uid, worker="compile@here")
    adaptation.refresh_from_db()
    assert adaptation.state == S.CANCELLED
    assert "a freeze everywhere lasts until" in adaptation.end_reason
    assert sent(stage) == set()


def test_a_command_is_not_valid_into_the_next_freeze(stage: Stage, carl: User) -> None:
    soon = timezone.now() + timedelta(seconds=9)
    window = freeze(carl, starts_at=soon, ends_at=soon + HOUR)
    remedy = propose(stage)
    assert remedy.state == S.DISPATCHED
    assert stage.command(remedy).expires_at <= window.starts_at
    end_freeze(freeze=window, user=carl, via="", reason="")
    graft = stage.propose()
    longer = stage.dispatched(graft)
    assert longer.expires_at > window.starts_at


def test_a_faster_kernel_is_not_offered_in_it(stage: Stage, carl: User) -> None:
    from apps.kernels.models import SpeedUp, SpeedUpState
    from tests.apps.cast import make_kernel

    adaptation = stage.grafted(stage.propose())
    SpeedUp.objects.filter(adaptation_uid=adaptation.uid).delete()
    row = SpeedUp.objects.create(
        adaptation_uid=adaptation.uid,
        run_uid=stage.run.uid,
        state=SpeedUpState.BUILDING,
        kernel=make_kernel(),
        worker_speedup=2.0,
    )
    freeze(carl)
    compiled_kernels.offer(row.pk)
    row.refresh_from_db()
    assert row.state == SpeedUpState.KEPT_EAGER
    assert CommandKind.SPEED_UP not in sent(stage)


# --- what is safe goes on ------------------------------------------------------------------------


def test_rejecting_undoing_pausing_and_killing_stay_possible(stage: Stage, carl: User) -> None:
    grafted = stage.grafted(stage.propose())
    waiting = stage.waiting(layer="head")
    freeze(carl)
    waiting.refresh_from_db()
    rejected = services.reject_adaptation(
        adaptation=waiting, user=stage.operator, via="", version=waiting.version, reason="no"
    )
    assert rejected.state == S.REJECTED
    undone = services.roll_back_adaptation(
        adaptation=grafted, user=stage.operator, via="", version=grafted.version, reason="worse"
    )
    assert undone.state == S.ROLLING_BACK
    services.request_adaptation_pause(run=stage.run, paused=True, user=stage.operator, via="")
    services.set_adaptation_switch(on=False, user=stage.operator, via="")
    kinds = set(Command.objects.filter(run=stage.run).values_list("kind", flat=True))
    assert {CommandKind.UNDO, CommandKind.PAUSE_ADAPTATION} <= kinds


def test_what_changes_nothing_goes_on(stage: Stage, carl: User) -> None:
    freeze(carl)
    asked = services.ask_for_remedy(
        run=stage.run,
        user=stage.operator,
        via="",
        remedy="evaluate_now",
        layer="",
        config={},
        reason="",
    )
    assert asked.state == S.DISPATCHED


def test_the_clock_of_a_proposal_in_a_freeze_starts_at_its_end(stage: Stage, carl: User) -> None:
    before = stage.waiting()
    window = freeze(carl, ends_at=timezone.now() + 10 * HOUR)
    made = stage.waiting(layer="head")
    assert before.deadline_at is not None
    assert made.deadline_at is not None
    length = timedelta(seconds=made.safety_policy.safety_policy().approval_timeout_seconds)
    assert made.deadline_at == window.ends_at + length
    before.refresh_from_db()
    assert before.deadline_at < window.ends_at  # and then it is refused, as ever


# --- where, and who --------------------------------------------------------------------------


def test_a_project_s_freeze_leaves_other_projects_alone(stage: Stage, carl: User) -> None:
    other = Project.objects.create(name="vision")
    adaptation = stage.waiting()
    admin = make_person("ada")
    freeze(admin, project=other)
    assert freeze_over(stage.run.project_id) is None
    assert freeze_over(other.pk) is not None
    assert approve(adaptation, stage.operator).state == S.COMPILE_QUEUED


@pytest.mark.parametrize(
    ("role", "status"),
    [(Role.CURATOR, 201), (Role.ADMIN, 201), (Role.OPERATOR, 403), (Role.RESEARCHER, 403),
     (Role.VIEWER, 403)],
)  # fmt: skip
def test_who_may_edit_policies_may_set_and_end_freezes(
    stage: Stage, carl: User, role: Role, status: int
) -> None:
    asks = Caller(token_of(make_person("kim", role), TokenScope.ACT))
    body = {"ends_at": (timezone.now() + HOUR).isoformat(), "reason": "holidays"}
    made = asks.post("freezes", body)
    assert made.status == status
    window = freeze(carl)
    ended = asks.post(f"freezes/{window.uid}/end", {"reason": "over"})
    assert ended.status == (200 if status == 201 else 403)


@pytest.fixture
def curator(carl: User) -> Caller:
    return Caller(token_of(carl, TokenScope.ACT))


def _after(**ends: float) -> str:
    return (timezone.now() + timedelta(**ends)).isoformat()


_SOON: dict[str, Any] = {"ends_at": lambda: _after(hours=1)}
_LATE: dict[str, Any] = {"ends_at": lambda: _after(days=401)}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"ends_at": lambda: _after(hours=-1), "reason": "x"}, 422),
        ({"ends_at": lambda: _after(days=40), "reason": "x"}, 422),
        ({**_SOON, "starts_at": lambda: _after(hours=2), "reason": "x"}, 422),
        ({**_LATE, "starts_at": lambda: _after(days=400), "reason": "x"}, 422),
        ({**_SOON, "reason": " "}, 422),
        (_SOON, 400),
        ({"ends_at": "tomorrow", "reason": "x"}, 400),
        ({**_SOON, "reason": "x", "project": "prj_none"}, 404),
        ({**_SOON, "reason": "x", "lasts": 3}, 400),
    ],
)
def test_times_that_make_no_sense_are_refused(
    curator: Caller, body: dict[str, Any], status: int
) -> None:
    given = {name: value() if callable(value) else value for name, value in body.items()}
    answer = curator.post("freezes", given)
    assert answer.status == status, answer.data
    assert not Freeze.objects.exists()


def test_each_act_has_its_audit_row_and_is_done_once(curator: Caller, carl: User) -> None:
    body = {"ends_at": _after(hours=1), "reason": "holidays"}
    one, two = (curator.post("freezes", body, **{"Idempotency-Key": "once"}) for _ in range(2))
    assert one.status == 201, one.data
    assert one.data["uid"] == two.data["uid"]
    uid = one.data["uid"]
    assert curator.post(f"freezes/{uid}/end", {"reason": "back early"}).status == 200
    again = curator.post(f"freezes/{uid}/end", {})
    assert (again.status, again.code) == (409, "freeze-over")
    rows = AuditEvent.objects.filter(act__startswith="freeze.").order_by("id")
    assert [(row.act, row.actor, row.reason) for row in rows] == [
        ("freeze.set", "carl", "holidays"),
        ("freeze.ended", "carl", "back early"),
    ]
    [listed] = curator.get("freezes").data["results"]
    assert (listed["uid"], listed["ended_by"]) == (uid, "carl")


def test_a_freeze_of_a_foreign_project_is_not_seen(stage: Stage, carl: User) -> None:
    hidden = Project.objects.create(name="hidden")
    window = freeze(make_person("ada"), project=hidden)
    asks = Caller(token_of(carl, TokenScope.ACT))
    assert asks.get("freezes").data["results"] == []
    assert asks.post(f"freezes/{window.uid}/end", {}).status == 404
    assert Run.objects.get(pk=stage.run.pk).project_id != hidden.pk
