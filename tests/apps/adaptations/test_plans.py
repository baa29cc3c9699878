"""A plan from Tamiyo's proposal to its end: approved once, applied in order, undone as a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from django.test import Client
from django.utils import timezone

from apps.accounts.models import User
from apps.adaptations import services
from apps.adaptations.history import run_facts
from apps.adaptations.models import Adaptation, Plan
from apps.adaptations.turns import its_turn
from apps.audit.models import AuditEvent
from apps.audit.services import verify_chain
from apps.policies.freezing import end_freeze, set_freeze
from apps.policies.models import Freeze, PolicyVersion
from apps.policies.services import current_policy
from apps.rest.problems import Problem
from apps.runs.models import Command
from esper.contracts import (
    AdaptationState,
    CommandState,
    CostForecast,
    LayerInfo,
    PlanState,
    RefusalCode,
    SafetyPolicy,
    TokenScope,
    Verdict,
    codec,
    wire,
)
from esper.contracts.protocol import PlanProposal, Proposal
from tests.apps.callers import Caller
from tests.apps.cast import CERTIFICATE, TAMIYO, make_layer, make_person, make_tamiyo, token_of
from tests.apps.stage import Stage

S, P = AdaptationState, PlanState
LAYERS = ("first", "second", "third")
pytestmark = pytest.mark.django_db


@pytest.fixture
def stage(stage: Stage) -> Stage:
    """With four layers in a row, and a policy that allows plans."""
    layers: list[LayerInfo] = [
        make_layer(name, order=place) for place, name in enumerate((*LAYERS, "last"))
    ]
    stage.run.layers = [layer.to_wire() for layer in layers]
    stage.run.save(update_fields=["layers"])
    allow(3)
    return stage


def allow(changes: int) -> None:
    values = SafetyPolicy(max_plan_changes=changes).to_wire()
    PolicyVersion.objects.filter(pk=current_policy().pk).update(values=values)


def member(stage: Stage, layer: str, **changes: Any) -> Proposal:
    return stage.proposal(layer=layer, confidence=0.6, **changes)


def proposal(stage: Stage, members: Sequence[Proposal] = ()) -> PlanProposal:
    return PlanProposal(
        epoch=stage.run.epoch,
        step=stage.run.step,
        members=tuple(members or (member(stage, layer) for layer in LAYERS)),
        value=0.9,
        parameters=200_000,
        memory_mib=1024.0,
        latency_ms=10.0,
        reasons=("3 of 9 options.",),
        asks=(),
        policy="heuristic-3",
    )


def proposed(stage: Stage, members: Sequence[Proposal] = ()) -> Plan:
    asked = proposal(stage, members)
    return services.propose_plan(
        run=stage.run, proposal=asked, idempotency_key=asked.key(stage.run.uid), actor=TAMIYO
    )


def approved(stage: Stage, plan: Plan, user: User | None = None, **changes: Any) -> Plan:
    values = {"version": plan.version, "evidence_hash": plan.evidence_hash, "reason": "together"}
    return services.approve_plan(
        plan=plan, user=user or stage.operator, via="session", **{**values, **changes}
    )


def of(plan: Plan) -> list[Adaptation]:
    return services.members_of(plan)


def shown_page(stage: Stage, plan: Plan) -> str:
    client = Client()
    client.force_login(stage.operator)
    return client.get(f"/plans/{plan.uid}").content.decode()


def states(plan: Plan) -> list[str]:
    return [str(one.state) for one in of(plan)]


def now(plan: Plan) -> Plan:
    services.advance_plan(plan.uid)
    plan.refresh_from_db()
    return plan


def apply_next(stage: Stage, plan: Plan) -> Adaptation:
    """Worker and trainer do their parts for the member whose turn it is."""
    one = next(one for one in of(plan) if one.state == S.COMPILED)
    services.dispatch_adaptation(one.uid, worker="compile@here")
    command = stage.command(one)
    stage.ack(command, CommandState.ACCEPTED)
    stage.ack(
        command, CommandState.APPLIED, step=1001, pause_ms=1.0, certificate=CERTIFICATE,
        digest_before="a" * 64, digest_after="b" * 64,
    )  # fmt: skip
    now(plan)
    return one


def compiled(stage: Stage, plan: Plan) -> Plan:
    for one in of(plan):
        stage.compiled(one)
    return now(plan)


def applied(stage: Stage) -> Plan:
    plan = compiled(stage, approved(stage, proposed(stage)))
    for _ in LAYERS:
        apply_next(stage, plan)
    assert plan.state == P.APPLIED
    return plan


def undone(stage: Stage, one: Adaptation, state: CommandState = CommandState.APPLIED) -> None:
    stage.ack(stage.command(one), state, step=1010, pause_ms=1.0, digest_after="a" * 64)


def undo_commands(plan: Plan) -> list[str]:
    uids = {one.uid: one.layer for one in of(plan)}
    rows = Command.objects.filter(kind="undo").order_by("seq")
    return [uids[row.adaptation_uid] for row in rows]


def test_it_waits_as_one_thing_and_counts_as_one_in_flight(stage: Stage) -> None:
    plan = proposed(stage)
    assert (plan.state, states(plan)) == (P.AWAITING_APPROVAL, [S.AWAITING_APPROVAL] * 3)
    assert plan.title == "Plan of 3 changes for run digits"
    assert run_facts(stage.run).in_flight == 1
    assert proposed(stage).pk == plan.pk  # the same key
    for act in ("approve", "reject", "cancel"):
        refusal = services.permissions(of(plan)[0], stage.operator)[act]
        assert (refusal.allowed, refusal.code) == (False, "part-of-plan")


def test_one_approval_applies_all_in_order_at_their_turn(stage: Stage) -> None:
    plan = compiled(stage, approved(stage, proposed(stage)))
    assert states(plan) == [S.COMPILED] * 3
    assert [its_turn(one) for one in of(plan)] == [True, False, False]
    services.dispatch_adaptation(of(plan)[2].uid, worker="compile@here")  # not its turn
    assert states(plan) == [S.COMPILED] * 3
    order = [apply_next(stage, plan).layer for _ in LAYERS]
    assert order == list(LAYERS)
    assert plan.state == P.APPLIED
    for one in of(plan):
        services.judge_adaptation(
            adaptation=one, verdict=Verdict(keep=True, reason="it pays"), reward_terms={},
            actor=TAMIYO,
        )  # fmt: skip
    assert now(plan).state == P.SETTLED
    assert plan.outcome == "All 3 changes were kept, so the plan is kept as a whole."
    linked = AuditEvent.objects.filter(object_uid__in=[one.uid for one in of(plan)])
    assert {event.data["plan"] for event in linked if "to" in event.data} == {plan.uid}
    acts = AuditEvent.objects.filter(object_uid=plan.uid).order_by("id")
    assert [event.act for event in acts] == [
        "plan.proposed", "plan.applying", "plan.applied", "plan.settled",
    ]  # fmt: skip
    assert verify_chain().verified


@pytest.mark.parametrize("place", [0, 2])
def test_where_one_change_is_not_kept_the_whole_plan_is_taken_back(
    stage: Stage, place: int
) -> None:
    plan = applied(stage)
    for number, one in enumerate(of(plan)):
        if number > place:
            continue  # has no verdict yet
        keep = number != place
        services.judge_adaptation(
            adaptation=one, verdict=Verdict(keep=keep, reason="no gain is shown"),
            reward_terms={}, actor=TAMIYO,
        )  # fmt: skip
    assert now(plan).state == P.APPLIED  # the trainer has not answered yet
    out = of(plan)[place]
    assert "open; " in shown_page(stage, plan)
    undone(stage, out)
    assert now(plan).state == P.TAKING_BACK
    rest = [layer for layer in LAYERS if layer != out.layer]
    for layer in reversed(rest):
        assert undo_commands(plan)[-1] == layer
        undone(stage, next(one for one in of(plan) if one.layer == layer))
        now(plan)
    assert plan.state == P.TAKEN_BACK
    assert set(states(plan)) <= {S.ROLLED_BACK, S.REVERTED}
    assert f"A-{out.number}" in plan.outcome
    assert "no gain is shown" in plan.outcome
    shown = shown_page(stage, plan)
    assert "Verdict of the whole:</strong> taken back." in shown
    assert "The plan is kept or taken back as a whole" in shown


def test_a_failure_of_the_second_stops_the_rest_and_takes_the_first_back(stage: Stage) -> None:
    plan = compiled(stage, approved(stage, proposed(stage)))
    first = apply_next(stage, plan)
    second = of(plan)[1]
    services.dispatch_adaptation(second.uid, worker="compile@here")
    refused = {"code": RefusalCode.INCOMPATIBLE_LAYER, "reason": "the layer has changed"}
    stage.ack(stage.command(second), CommandState.REFUSED, **refused)
    assert now(plan).state == P.TAKING_BACK
    assert states(plan) == [S.ROLLING_BACK, S.NOT_APPLIED, S.CANCELLED]
    assert Command.objects.filter(kind="undo").get().payload["hard"] is True
    undone(stage, first)
    assert now(plan).state == P.TAKEN_BACK
    assert states(plan) == [S.ROLLED_BACK, S.NOT_APPLIED, S.CANCELLED]
    assert "the layer has changed" in plan.outcome
    assert "is out of the model" in plan.outcome


def test_what_could_not_be_taken_out_is_named(stage: Stage) -> None:
    plan = compiled(stage, approved(stage, proposed(stage)))
    first = apply_next(stage, plan)
    services.take_back_plan(
        plan=plan, user=stage.operator, via="session", version=plan.version, reason="not now"
    )
    assert states(plan) == [S.ROLLING_BACK, S.CANCELLED, S.CANCELLED]
    undone(stage, first, CommandState.FAILED)
    assert now(plan).state == P.INCOMPLETE
    assert f"stays in the model: A-{first.number}" in plan.outcome


def test_a_person_undoes_it_as_a_whole_the_last_change_first(stage: Stage) -> None:
    plan = applied(stage)
    services.take_back_plan(
        plan=plan, user=stage.owner, via="session", version=plan.version, reason="not now"
    )
    for layer in reversed(LAYERS):
        assert undo_commands(plan)[-1] == layer
        undone(stage, next(one for one in of(plan) if one.layer == layer))
        now(plan)
    assert undo_commands(plan) == list(reversed(LAYERS))
    assert (plan.state, states(plan)) == (P.TAKEN_BACK, [S.ROLLED_BACK] * 3)


@pytest.mark.parametrize("change", ["config", "value", "limits", "order"])
def test_an_approval_is_bound_to_the_whole_plan(stage: Stage, change: str) -> None:
    plan = proposed(stage)
    first, second, _ = of(plan)
    rows = Adaptation.objects.filter(pk=first.pk)
    if change == "config":
        rows.update(config={"rank": 64})
    elif change == "order":
        Adaptation.objects.filter(pk=second.pk).update(plan_place=9)
    else:
        value = {"value": 5.0, "limits": {"parameters": 1}}[change]
        Plan.objects.filter(pk=plan.pk).update(**{change: value})
    with pytest.raises(Problem) as caught:
        approved(stage, plan)
    assert caught.value.code == "payload-changed"
    assert states(plan) == [S.AWAITING_APPROVAL] * 3


def test_only_an_operator_of_another_run_approves_it(stage: Stage) -> None:
    plan = proposed(stage)
    for user, code in ((stage.owner, "self-approval"), (stage.viewer, "not-eligible")):
        with pytest.raises(Problem) as caught:
            approved(stage, plan, user)
        assert caught.value.code == code
    approved(stage, plan)
    with pytest.raises(Problem) as caught:
        approved(stage, plan, stage.second)
    assert caught.value.code == "decision-not-pending"


def test_a_rejection_ends_every_member(stage: Stage) -> None:
    plan = proposed(stage)
    services.reject_plan(
        plan=plan, user=stage.operator, via="session", version=plan.version, reason="too much"
    )
    assert (plan.state, states(plan)) == (P.REJECTED, [S.REJECTED] * 3)


def test_it_expires_as_a_whole(stage: Stage) -> None:
    plan = proposed(stage)
    Adaptation.objects.filter(plan=plan, plan_place=1).update(deadline_at="2020-01-01T00:00Z")
    services.sweep()
    services.advance_plans()
    plan.refresh_from_db()
    assert (plan.state, states(plan)) == (P.EXPIRED, [S.EXPIRED] * 3)


def test_the_end_of_its_run_ends_it(stage: Stage) -> None:
    plan = compiled(stage, approved(stage, proposed(stage)))
    apply_next(stage, plan)
    stage.run.refresh_from_db()
    services.close_open_adaptations(stage.run, TAMIYO, "the run has finished")
    stage.run.state = "finished"
    stage.run.save(update_fields=["state"])
    assert now(plan).state == P.INCOMPLETE
    assert "run lost" in plan.outcome


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"layers": ("first", "first")}, "plan-conflict"),
        ({"since": "first"}, "plan-conflict"),
        ({"layers": (*LAYERS, "last")}, "plan-too-large"),
        ({"memory": 600.0}, "gate-closed"),
        ({"memory": math.nan}, "gate-closed"),
        ({"parameters": 80_000}, "gate-closed"),
        ({"confidence": 0.01}, "gate-closed"),
    ],
    ids=["layer", "span", "size", "memory", "unknown", "parameters", "confidence"],
)
def test_the_server_checks_the_plan_itself(
    stage: Stage, changes: dict[str, Any], code: str
) -> None:
    layers = changes.get("layers", LAYERS)
    members = [member(stage, layer) for layer in layers]
    if "since" in changes:
        members[2] = msgspec.structs.replace(members[2], since="first")
    if "confidence" in changes:
        members[1] = msgspec.structs.replace(members[1], confidence=changes["confidence"])
    if {"memory", "parameters"} & set(changes):
        cost = CostForecast(changes.get("parameters", 2048), 1, changes.get("memory", 0.1), 0.1)
        members = [msgspec.structs.replace(one, forecast=cost) for one in members]
    with pytest.raises(Problem) as caught:
        proposed(stage, members)
    assert caught.value.code == code
    assert not Adaptation.objects.exists()
    assert not Plan.objects.exists()


def test_no_plan_without_a_policy_that_allows_it(stage: Stage) -> None:
    allow(1)
    with pytest.raises(Problem) as caught:
        proposed(stage)
    assert caught.value.code == "plan-too-large"


def test_the_api_proposes_shows_approves_and_undoes(stage: Stage) -> None:
    tamiyo = Caller(token_of(make_tamiyo(), TokenScope.DECIDE, TokenScope.READ))
    operator = Caller(token_of(stage.operator, TokenScope.READ, TokenScope.ACT))
    body = codec.decode(codec.encode(wire.to_wire(proposal(stage))))
    made = tamiyo.post(f"runs/{stage.run.uid}/plans", body)
    assert made.status == 201, made.data
    uid = made.data["uid"]
    assert [one["layer"] for one in made.data["members"]] == list(LAYERS)
    assert operator.get("plans?state=awaiting_approval").data["results"][0]["uid"] == uid
    shown = operator.get(f"plans/P-{made.data['number']}").data
    assert shown["permissions"]["approve"]["allowed"]
    refused = operator.act(
        f"plans/{uid}/approve", {"evidence_hash": "0" * 64}, version=shown["version"]
    )
    assert refused.code == "payload-changed"
    done = operator.act(
        f"plans/{uid}/approve",
        {"evidence_hash": shown["evidence_hash"]},
        version=shown["version"],
    )
    assert (done.status, done.data["state"]) == (200, P.APPLYING)
    back = operator.act(f"plans/{uid}/undo", {"reason": "no"}, version=done.data["version"])
    assert (back.status, back.data["state"]) == (200, P.TAKEN_BACK)
    assert "Nothing of it was applied." in back.data["outcome"]


def test_the_pages_show_one_plan_and_its_members(stage: Stage) -> None:
    plan = proposed(stage)
    client = Client()
    client.force_login(stage.operator)
    inbox = client.get("/inbox").content.decode()
    assert "Plan of 3 changes for run digits" in inbox
    assert of(plan)[0].uid not in inbox
    page = client.get(f"/plans/{plan.uid}").content.decode()
    assert "Approve plan" in page
    assert plan.evidence_hash in page
    for one in of(plan):
        assert f"A-{one.number}" in page
    member_page = client.get(f"/adaptations/{of(plan)[0].uid}").content.decode()
    assert f"/plans/{plan.uid}" in member_page


def frozen(hours: int = 1) -> Freeze:
    ends = timezone.now() + timedelta(hours=hours)
    return set_freeze(ends_at=ends, reason="holidays", user=make_person("carl"), via="")


def test_a_plan_waits_for_the_end_of_a_freeze(stage: Stage) -> None:
    window = frozen()
    plan = proposed(stage)
    with pytest.raises(Problem) as refused:
        approved(stage, plan)
    assert (refused.value.status, refused.value.code) == (409, "freeze")
    deadlines = [plan.deadline_at, *(one.deadline_at for one in of(plan))]
    assert all(deadline and deadline > window.ends_at for deadline in deadlines)
    end_freeze(freeze=window, user=window.set_by, via="")
    assert approved(stage, plan).state == P.APPLYING


def test_a_plan_that_a_freeze_cuts_in_two_is_taken_back(stage: Stage) -> None:
    plan = compiled(stage, approved(stage, proposed(stage)))
    apply_next(stage, plan)
    frozen()
    services.dispatch_adaptation(of(plan)[1].uid, worker="compile@here")
    assert now(plan).state == P.TAKING_BACK
    assert "a freeze everywhere lasts until" in plan.outcome
    assert states(plan)[0] == S.ROLLING_BACK
