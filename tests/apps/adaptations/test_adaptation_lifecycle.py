"""What people rely on while an adaptation lives."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.models import F
from django.db.utils import DatabaseError
from django.utils import timezone

from apps.adaptations import services
from apps.adaptations.dispatch import request_undo
from apps.adaptations.lifecycle import DEADLINES, NEXT, StaleAdaptationError, transition
from apps.adaptations.models import Adaptation
from apps.audit import triggers
from apps.audit.chain import event_hash
from apps.audit.models import AuditEvent, AuditHead
from apps.audit.services import verify_chain
from apps.notifications.models import FeedEvent, OutboxMessage
from apps.policies.services import publish_policy
from apps.rest.problems import Problem
from apps.runs.models import Command, Run
from apps.runs.services import commands_after
from apps.trainers import services as trainers
from apps.violations.models import Violation
from apps.workers import services as workers
from apps.workers.models import CompileJob
from esper.contracts import (
    ADAPTATION_ENDED,
    ADAPTATION_PASSED_THROUGH,
    AdaptationState,
    CommandState,
    Risk,
    Verdict,
    ViolationRule,
)
from esper.contracts.protocol import Applied, Rollback
from tests.apps.cast import CERTIFICATE, TAMIYO, TRAINER, WORKER, make_kernel, make_person
from tests.apps.stage import NAN, Stage

S = AdaptationState


def states(adaptation: Adaptation) -> list[str]:
    """The states that the audit log says it went through."""
    events = AuditEvent.objects.filter(object_uid=adaptation.uid).order_by("id")
    return [event.data["to"] for event in events if "to" in event.data]


def act(name: str, adaptation: Adaptation, user: Any, **changes: Any) -> Adaptation:
    values = {"version": adaptation.version, "reason": "because", **changes}
    if name == "approve":
        values.setdefault("evidence_hash", adaptation.evidence_hash)
    service = getattr(services, f"{name}_adaptation")
    return service(adaptation=adaptation, user=user, via="session", **values)


def test_every_state_has_next_states_and_every_one_that_can_wait_a_deadline() -> None:
    assert set(NEXT) == set(S)
    assert set(DEADLINES) == set(S) - ADAPTATION_ENDED - ADAPTATION_PASSED_THROUGH
    assert all(DEADLINES[state].outcome in NEXT[state] for state in DEADLINES)


def test_no_deadline_leads_to_a_graft() -> None:
    applying = {S.APPROVED, S.DISPATCHED, S.PROBATION, S.KEPT}
    assert not applying & {deadline.outcome for deadline in DEADLINES.values()}


def test_a_confident_low_risk_proposal_goes_by_rule_to_kept(stage: Stage) -> None:
    adaptation = stage.propose()
    assert adaptation.state == S.COMPILE_QUEUED
    assert adaptation.decided_rule.startswith("policy v1: confidence 0.90 ≥ 0.75")
    stage.grafted(adaptation)
    assert (adaptation.graft_step, adaptation.pause_ms) == (120, 2.5)
    verdict = Verdict(keep=True, reason="it pays", ablation_gain=0.1, forecast_gain=0.05)
    services.judge_adaptation(
        adaptation=adaptation, verdict=verdict, reward_terms={"gain": 1.0}, actor=TAMIYO
    )
    adaptation.refresh_from_db()
    assert (adaptation.state, adaptation.reward) == (S.KEPT, 1.0)
    assert states(adaptation) == [
        "proposed", "approved", "compile_queued", "compiling", "compiled",
        "dispatched", "accepted", "probation", "kept",
    ]  # fmt: skip
    assert verify_chain().verified


def test_the_same_key_never_makes_a_second_adaptation(stage: Stage) -> None:
    first = stage.propose()
    assert stage.propose().pk == first.pk
    assert Adaptation.objects.count() == CompileJob.objects.count() == 1


@pytest.mark.parametrize("confidence", [0.6, NAN])
def test_an_unsure_decision_is_never_approved_by_rule(stage: Stage, confidence: float) -> None:
    try:
        adaptation = stage.propose(confidence=confidence)
    except services.GateClosedError:
        assert not Adaptation.objects.exists()
    else:
        assert adaptation.state == S.AWAITING_APPROVAL
        assert adaptation.asks


def test_when_confidence_was_too_high_of_late_more_is_needed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = [("proj_ia3", 0.9, place % 5 > 0) for place in range(50)]  # 80 % were kept
    closed[::2] = [("proj_ia3", 0.9, False)] * 25
    monkeypatch.setattr("apps.adaptations.proposals.closed_confidences", lambda: closed)
    adaptation = stage.propose()

    assert adaptation.state == AdaptationState.AWAITING_APPROVAL
    assert any("too high on the average" in line for line in adaptation.asks)


def test_a_function_changing_blueprint_always_asks_whatever_the_proposal_claims(
    stage: Stage,
) -> None:
    stage.blueprint.risk = Risk.HIGH
    stage.blueprint.save()
    adaptation = stage.propose(confidence=0.99, risk=Risk.NONE)
    assert (adaptation.state, adaptation.risk) == (S.AWAITING_APPROVAL, Risk.HIGH)


def test_a_broken_limit_declines_and_leaves_a_violation(stage: Stage) -> None:
    from esper.contracts import CostForecast

    with pytest.raises(services.GateClosedError) as caught:
        stage.propose(forecast=CostForecast(2048, 4096, 5000.0, 0.1))
    assert caught.value.status == 409
    violation = Violation.objects.get()
    assert violation.rule == ViolationRule.MEMORY
    assert "5" in violation.observed
    assert "1" in violation.limit
    assert violation.action
    assert not Adaptation.objects.exists()


@pytest.mark.parametrize("to", [S.KEPT, S.APPROVED, S.AWAITING_APPROVAL])
def test_the_database_refuses_a_transition_that_the_lifecycle_does_not_have(
    stage: Stage, to: AdaptationState
) -> None:
    adaptation = act("reject", stage.waiting(), stage.operator)
    with pytest.raises(DatabaseError, match="no such transition"), transaction.atomic():
        Adaptation.objects.filter(pk=adaptation.pk).update(state=to)
    adaptation.refresh_from_db()
    assert adaptation.state == S.REJECTED


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"layer": "nowhere"}, "unknown-layer"),
        ({"layer": "frozen"}, "incompatible-layer"),
        ({"blueprint": "nothing"}, "unknown-blueprint"),
        ({"epoch": 7}, "old-epoch"),
    ],
)
def test_bad_proposals_are_refused_and_write_nothing(
    stage: Stage, changes: dict[str, Any], code: str
) -> None:
    with pytest.raises(Problem) as caught:
        stage.propose(**changes)
    assert caught.value.code == code
    assert not Adaptation.objects.exists()


def test_a_layer_has_one_adaptation_in_flight(stage: Stage) -> None:
    stage.waiting()
    with pytest.raises(services.GateClosedError):
        stage.waiting(step=2000)
    assert not Violation.objects.exists()  # waiting for its turn breaks no limit


def test_a_layer_does_not_get_the_same_blueprint_twice_nor_a_conflicting_one(
    stage: Stage,
) -> None:
    from apps.blueprints.models import Blueprint

    adaptation = stage.grafted(stage.propose())
    services.judge_adaptation(
        adaptation=adaptation, verdict=Verdict(keep=True, reason=""), reward_terms={}, actor=TAMIYO
    )
    rival = Blueprint.objects.get()
    rival.pk, rival.slug, rival.ident, rival.conflicts = None, "rival", "BP-R", ["proj_lora_64"]
    rival.save()
    for slug in ("proj_lora_64", "rival"):
        with pytest.raises(services.GateClosedError) as caught:
            stage.propose(step=9000, blueprint=slug)
        assert caught.value.checks[0].rule == ViolationRule.COMPATIBILITY


def test_a_layer_must_carry_what_a_blueprint_requires(stage: Stage) -> None:
    from apps.blueprints.models import Blueprint

    part = Blueprint.objects.get()
    part.pk, part.slug, part.ident, part.requires = None, "part", "BP-PART", ["proj_lora_64"]
    part.save()
    with pytest.raises(services.GateClosedError) as caught:
        stage.propose(blueprint="part")
    assert caught.value.checks[0].rule == ViolationRule.COMPATIBILITY
    assert "part needs proj_lora_64 on" in caught.value.checks[0].text
    adaptation = stage.grafted(stage.propose())
    services.judge_adaptation(
        adaptation=adaptation, verdict=Verdict(keep=True, reason=""), reward_terms={}, actor=TAMIYO
    )
    assert stage.propose(step=9000, blueprint="part").blueprint.slug == "part"


def test_a_person_approves_and_is_named(stage: Stage) -> None:
    adaptation = stage.waiting()
    act("approve", adaptation, stage.operator)
    assert (adaptation.state, adaptation.decided_by) == (S.COMPILE_QUEUED, stage.operator)
    event = AuditEvent.objects.get(act="adaptation.approved")
    assert (event.actor, event.reason, event.via) == ("olga", "because", "session")


def test_the_second_operator_loses_the_race_and_is_told_who_won(stage: Stage) -> None:
    adaptation = stage.waiting()
    seen_by_second = Adaptation.objects.get(pk=adaptation.pk)
    act("approve", adaptation, stage.operator)
    with pytest.raises(StaleAdaptationError) as caught:
        act("reject", seen_by_second, stage.second)
    assert caught.value.extra["decided_by"] == "olga"


def test_a_transition_that_the_lifecycle_does_not_have_is_refused_before_the_database(
    stage: Stage,
) -> None:
    adaptation = stage.waiting()
    with pytest.raises(ValueError, match="awaiting_approval -> kept is not a transition"):
        transition(adaptation, S.KEPT, actor=TAMIYO)


def test_a_row_that_changed_without_changing_its_state_is_not_moved(stage: Stage) -> None:
    adaptation = stage.waiting()
    stale = Adaptation.objects.get(pk=adaptation.pk)
    act("claim", adaptation, stage.operator)
    with pytest.raises(StaleAdaptationError):
        transition(stale, S.REJECTED, actor=TAMIYO)


@pytest.mark.parametrize(("who", "code"), [("viewer", "not-eligible"), ("owner", "self-approval")])
def test_who_may_not_approve_is_told_why(stage: Stage, who: str, code: str) -> None:
    adaptation = stage.waiting()
    with pytest.raises(Problem) as caught:
        act("approve", adaptation, getattr(stage, who))
    assert caught.value.code == code


def test_an_operator_cannot_approve_their_own_run(stage: Stage) -> None:
    Run.objects.update(owner=stage.operator)
    with pytest.raises(Problem) as caught:
        act("approve", stage.waiting(), stage.operator)
    assert caught.value.code == "self-approval"


def test_a_late_approval_is_refused_even_when_nobody_sweeps(stage: Stage) -> None:
    adaptation = stage.waiting()
    Adaptation.objects.update(deadline_at=timezone.now() - timedelta(milliseconds=1))
    with pytest.raises(Problem):
        act("approve", adaptation, stage.operator)
    adaptation.refresh_from_db()
    assert adaptation.state == S.AWAITING_APPROVAL
    services.sweep()
    adaptation.refresh_from_db()
    assert adaptation.state == S.EXPIRED
    assert not CompileJob.objects.exists()


@pytest.mark.parametrize("name", ["extend", "claim"])
def test_a_deadline_that_has_passed_cannot_be_moved(stage: Stage, name: str) -> None:
    adaptation = stage.waiting()
    Adaptation.objects.update(deadline_at=timezone.now() - timedelta(milliseconds=1))
    for late in (name, "approve"):
        with pytest.raises(Problem) as caught:
            act(late, adaptation, stage.operator)
        assert (caught.value.status, caught.value.code) == (409, "decision-expired")
    assert not services.permissions(adaptation, stage.operator)[name].allowed
    assert act("reject", adaptation, stage.operator).state == S.REJECTED


@pytest.mark.parametrize("name", ["extend", "approve"])
def test_the_deadline_is_judged_by_the_clock_of_the_database(
    stage: Stage, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adaptation = stage.waiting()
    Adaptation.objects.update(deadline_at=timezone.now() - timedelta(milliseconds=1))
    monkeypatch.setattr("apps.adaptations.acts._too_late", lambda _: False)  # a slow web clock
    with pytest.raises(StaleAdaptationError) as caught:
        act(name, adaptation, stage.operator)
    assert caught.value.code == "decision-expired"


def test_what_was_shown_must_be_what_is_approved(stage: Stage) -> None:
    adaptation = stage.waiting()
    for changes, status in (({"version": 1}, 412), ({"evidence_hash": "f" * 64}, 412)):
        with pytest.raises(Problem) as caught:
            act("approve", adaptation, stage.operator, **changes)
        assert caught.value.status == status


def test_a_row_that_was_changed_in_the_database_cannot_be_approved(stage: Stage) -> None:
    adaptation = stage.waiting()
    Adaptation.objects.filter(pk=adaptation.pk).update(config={"rank": 64})
    with pytest.raises(Problem) as caught:
        act("approve", adaptation, stage.operator)
    assert (caught.value.status, caught.value.code) == (412, "payload-changed")
    assert Adaptation.objects.get(pk=adaptation.pk).state == S.AWAITING_APPROVAL


def test_a_proposal_to_a_trainer_that_was_started_again_is_withdrawn(stage: Stage) -> None:
    adaptation = stage.waiting()
    stage.restart_trainer()
    with pytest.raises(Problem) as caught:
        act("approve", adaptation, stage.operator)
    assert (caught.value.status, caught.value.code) == (409, "decision-not-pending")
    withdrawn = Adaptation.objects.get(pk=adaptation.pk)
    assert withdrawn.state == S.SUPERSEDED
    assert withdrawn.end_reason == "the trainer was started again, and proposes anew"


def test_a_proposal_to_a_trainer_that_was_started_again_cannot_be_approved(stage: Stage) -> None:
    """Also where nothing has withdrawn it."""
    adaptation = stage.waiting()
    Run.objects.filter(pk=adaptation.run_id).update(epoch=F("epoch") + 1)
    with pytest.raises(Problem) as caught:
        act("approve", adaptation, stage.operator)
    assert (caught.value.status, caught.value.code) == (409, "old-epoch")
    assert Adaptation.objects.get(pk=adaptation.pk).state == S.AWAITING_APPROVAL


def test_a_claim_holds_the_others_off_until_it_is_released(stage: Stage) -> None:
    adaptation = act("claim", stage.waiting(), stage.operator)
    with pytest.raises(Problem) as caught:
        act("approve", adaptation, stage.second)
    assert (caught.value.code, caught.value.extra["claimed_by"]) == ("claim-held", "olga")
    act("release", adaptation, stage.operator)
    act("approve", adaptation, stage.second)


def test_a_rejection_needs_a_reason(stage: Stage) -> None:
    adaptation = stage.waiting()
    with pytest.raises(Problem) as caught:
        act("reject", adaptation, stage.operator, reason="  ")
    assert caught.value.code == "reason-required"
    assert act("reject", adaptation, stage.operator).state == S.REJECTED


def test_what_was_rejected_is_not_proposed_again_before_a_doubled_cooldown(stage: Stage) -> None:
    rejected = act("reject", stage.waiting(step=1000), stage.operator)
    an_hour_ago = timezone.now() - timedelta(hours=1)  # the pause in seconds is over
    Adaptation.objects.filter(pk=rejected.pk).update(ended_at=an_hour_ago)
    for step in (1001, 1799):
        with pytest.raises(services.GateClosedError):
            stage.waiting(step=step)
    assert stage.waiting(step=1800).state == S.AWAITING_APPROVAL


def test_three_extensions_and_no_more(stage: Stage) -> None:
    adaptation = stage.waiting()
    for _ in range(3):
        before = adaptation.deadline_at
        act("extend", adaptation, stage.operator)
        assert adaptation.deadline_at > before
    with pytest.raises(Problem):
        act("extend", adaptation, stage.operator)


def test_the_kill_switch_stops_approvals_proposals_and_dispatch(stage: Stage) -> None:
    waiting, compiled = stage.waiting(), stage.compiled(stage.propose(layer="head"))
    services.set_adaptation_switch(on=False, user=stage.operator, via="session")
    with pytest.raises(Problem) as caught:
        act("approve", waiting, stage.operator)
    assert caught.value.status == 423
    services.dispatch_adaptation(compiled.uid, worker="w")
    compiled.refresh_from_db()
    assert compiled.state == S.CANCELLED
    assert not Command.objects.filter(kind="graft").exists()
    assert Command.objects.get(kind="pause_adaptation").run == stage.run
    assert act("reject", waiting, stage.operator).state == S.REJECTED  # safe acts still work


def test_a_refused_command_ends_as_not_applied_with_a_violation(stage: Stage) -> None:
    adaptation = stage.propose()
    command = stage.dispatched(adaptation)
    stage.ack(command, CommandState.REFUSED, code="bad_signature", reason="not our key")
    adaptation.refresh_from_db()
    assert adaptation.state == S.NOT_APPLIED
    assert Violation.objects.get().rule == ViolationRule.SIGNATURE


def test_repeated_and_late_acknowledgements_change_nothing(stage: Stage) -> None:
    adaptation = stage.grafted(stage.propose())
    version = adaptation.version
    command = stage.command(adaptation)
    for state in (CommandState.APPLIED, CommandState.ACCEPTED, CommandState.FAILED):
        stage.ack(command, state, step=999)
    adaptation.refresh_from_db()
    command.refresh_from_db()
    assert (adaptation.version, adaptation.graft_step) == (version, 120)
    assert (command.state, command.step) == (CommandState.APPLIED, 120)


def test_a_bad_verdict_takes_the_graft_out_and_checks_the_digest(stage: Stage) -> None:
    adaptation = stage.grafted(stage.propose())
    services.judge_adaptation(
        adaptation=adaptation,
        verdict=Verdict(keep=False, reason="harmful", forecast_gain=-0.2),
        reward_terms={"gain": -0.2},
        actor=TAMIYO,
    )
    command = stage.command(adaptation)
    assert (command.kind, command.payload["hard"]) == ("undo", True)
    stage.ack(command, CommandState.APPLIED, step=300, digest_after="a" * 64)
    adaptation.refresh_from_db()
    assert (adaptation.state, adaptation.undo_exact) == (S.ROLLED_BACK, True)


def test_a_kept_graft_is_reverted_by_a_person(stage: Stage) -> None:
    adaptation = stage.grafted(stage.propose())
    services.judge_adaptation(
        adaptation=adaptation,
        verdict=Verdict(keep=True, reason="pays"),
        reward_terms={},
        actor=TAMIYO,
    )
    adaptation.refresh_from_db()
    act("roll_back", adaptation, stage.operator)
    stage.ack(stage.command(adaptation), CommandState.APPLIED, step=900)
    adaptation.refresh_from_db()
    assert adaptation.state == S.REVERTED


def test_an_undo_that_fails_quarantines_the_run(stage: Stage) -> None:
    adaptation = stage.grafted(stage.propose())
    act("roll_back", adaptation, stage.operator)
    stage.ack(stage.command(adaptation), CommandState.FAILED, reason="no snapshot")
    adaptation.refresh_from_db()
    stage.run.refresh_from_db()
    assert (adaptation.state, bool(stage.run.quarantined_reason)) == (S.ROLLBACK_FAILED, True)
    with pytest.raises(services.GateClosedError):
        stage.propose(layer="head", step=5000)


def test_probation_without_a_verdict_is_rolled_back_never_kept(stage: Stage) -> None:
    adaptation = stage.grafted(stage.propose())
    Adaptation.objects.update(deadline_at=timezone.now() - timedelta(seconds=1))
    services.sweep()
    adaptation.refresh_from_db()
    assert adaptation.state == S.ROLLING_BACK
    assert Violation.objects.filter(rule=ViolationRule.MISSING_TELEMETRY).exists()


def test_the_trainers_own_rollback_is_taken_over(stage: Stage) -> None:
    adaptation = stage.grafted(stage.propose())
    report = Rollback(
        epoch=1,
        adaptation=adaptation.uid,
        step=123,
        rule=ViolationRule.NON_FINITE,
        observed="nan",
        limit="finite",
        pause_ms=1.0,
        exact=True,
    )
    for _ in range(2):  # reports are repeated until they are answered
        trainers.record_local_rollback(run=stage.run, report=report, actor=TRAINER)
    adaptation.refresh_from_db()
    assert (adaptation.state, adaptation.undo_exact) == (S.ROLLED_BACK, True)
    assert Violation.objects.filter(rule=ViolationRule.NON_FINITE).count() == 1


@pytest.mark.parametrize(("holds", "end"), [(True, S.PROBATION), (False, S.ROLLED_BACK)])
def test_a_restarted_trainer_settles_what_is_in_doubt(
    stage: Stage, holds: bool, end: AdaptationState
) -> None:
    adaptation = stage.grafted(stage.propose())
    stage.restart_trainer()
    adaptation.refresh_from_db()
    assert adaptation.state == S.IN_DOUBT
    held = [Applied(adaptation=adaptation.uid, layer="fc", blueprint="x", step=120)]
    trainers.settle_hello(
        run=stage.run, epoch=2, step=130, applied=held if holds else [], actor=TRAINER
    )
    adaptation.refresh_from_db()
    assert adaptation.state == end


def test_a_dispatched_command_dies_with_its_epoch(stage: Stage) -> None:
    adaptation = stage.propose()
    command = stage.dispatched(adaptation)
    stage.restart_trainer()
    assert commands_after(stage.run, 0) == []
    trainers.settle_hello(run=stage.run, epoch=2, step=0, applied=[], actor=TRAINER)
    adaptation.refresh_from_db()
    command.refresh_from_db()
    assert (adaptation.state, command.state) == (S.NOT_APPLIED, CommandState.EXPIRED)


def test_a_resumed_checkpoint_with_a_rolled_back_graft_is_cleaned(stage: Stage) -> None:
    adaptation = stage.grafted(stage.propose())
    act("roll_back", adaptation, stage.operator)
    stage.ack(stage.command(adaptation), CommandState.APPLIED, step=300)
    stage.restart_trainer()
    held = [Applied(adaptation=adaptation.uid, layer="fc", blueprint="x", step=120)]
    trainers.settle_hello(run=stage.run, epoch=2, step=130, applied=held, actor=TRAINER)
    assert stage.command(adaptation).epoch == 2
    assert stage.command(adaptation).kind == "undo"


def test_an_accepted_command_of_a_silent_trainer_is_in_doubt_not_failed(stage: Stage) -> None:
    adaptation = stage.propose()
    stage.ack(stage.dispatched(adaptation), CommandState.ACCEPTED)
    past = timezone.now() - timedelta(minutes=10)
    Adaptation.objects.update(deadline_at=past)
    Run.objects.update(last_seen_at=past)
    services.sweep()
    adaptation.refresh_from_db()
    assert adaptation.state == S.IN_DOUBT


def test_a_lost_worker_gives_its_job_back_three_times_then_it_fails(stage: Stage) -> None:
    adaptation = stage.propose()
    for attempt in (1, 2, 3):
        job = CompileJob.objects.get()
        assert workers.claim_job(job, worker=f"w{attempt}")
        adaptation.refresh_from_db()
        transition(adaptation, S.COMPILING, actor=WORKER)
        CompileJob.objects.update(lease_until=timezone.now() - timedelta(seconds=1))
        services.sweep()
        adaptation.refresh_from_db()
        assert adaptation.state == (S.COMPILE_QUEUED if attempt < 3 else S.COMPILE_FAILED)


def test_a_zombie_workers_late_result_is_refused(stage: Stage) -> None:

    adaptation = stage.propose()
    zombie = CompileJob.objects.get()
    workers.claim_job(zombie, worker="zombie")
    transition(adaptation, S.COMPILING, actor=WORKER)
    CompileJob.objects.update(lease_until=timezone.now() - timedelta(seconds=1))
    services.sweep()
    assert not workers.finish_job(
        zombie, kernel_digest=make_kernel().digest, cached=False, build_ms=1.0
    )
    assert CompileJob.objects.get().state == "queued"
    # The fence is the number of the attempt: also while another worker has the job.
    assert workers.claim_job(CompileJob.objects.get(), worker="another")
    assert not workers.finish_job(
        zombie, kernel_digest=make_kernel().digest, cached=False, build_ms=1.0
    )
    assert CompileJob.objects.get().state == "running"


def test_the_end_of_a_run_leaves_nothing_open(stage: Stage) -> None:
    stage.waiting()
    stage.grafted(stage.propose(layer="head"))
    trainers.finish_run(
        run=stage.run, epoch=1, state="finished", step=2000, reason="done", actor=TRAINER
    )
    assert {row.state for row in Adaptation.objects.all()} == {S.CANCELLED, S.RUN_LOST}


def test_limits_broken_by_the_measured_numbers_stop_the_adaptation(stage: Stage) -> None:
    from apps.adaptations.compile_jobs import _measured_limits_hold

    adaptation = stage.propose()
    job = CompileJob.objects.get()
    workers.claim_job(job, worker="w")
    transition(adaptation, S.COMPILING, actor=WORKER)
    transition(adaptation, S.COMPILED, actor=WORKER)
    kernel = make_kernel()
    kernel.certificate = {**CERTIFICATE.to_wire(), "latency_ms": 99.0}
    assert not _measured_limits_hold(adaptation, kernel)
    assert adaptation.state == S.DECLINED
    assert Violation.objects.get().rule == ViolationRule.LATENCY


def test_messages_that_could_not_be_sent_stay_owed(stage: Stage) -> None:
    stage.propose()
    assert OutboxMessage.objects.filter(sent_at=None, task="adaptations.compile").exists()


@pytest.mark.parametrize("task", ["adaptations.compile", "adaptations.dispatch"])
def test_a_lost_task_message_is_sent_again_once_a_period(stage: Stage, task: str) -> None:
    adaptation = stage.propose()
    if task == "adaptations.dispatch":
        stage.compiled(adaptation)
    OutboxMessage.objects.update(sent_at=timezone.now())  # sent, and lost with Redis
    services.sweep()
    assert not OutboxMessage.objects.filter(sent_at=None).exists()  # too early to worry
    Adaptation.objects.update(changed_at=timezone.now() - timedelta(seconds=30))
    services.sweep()
    services.sweep()
    assert OutboxMessage.objects.get(sent_at=None).task == task


def test_events_of_a_run_are_numbered_without_a_gap(stage: Stage) -> None:
    stage.grafted(stage.propose())
    seqs = list(
        FeedEvent.objects.filter(topic=f"run:{stage.run.uid}").values_list("seq", flat=True)
    )
    assert seqs == list(range(1, len(seqs) + 1))
    assert len(seqs) > 8


def test_a_policy_that_makes_no_sense_is_refused(stage: Stage) -> None:

    curator = make_person("carl")
    with pytest.raises(Problem):
        publish_policy(changes={"confidence_auto": 0.01}, reason="x", user=curator, via="")
    version = publish_policy(changes={"confidence_auto": 0.95}, reason="x", user=curator, via="")
    assert version.version == 2
    assert stage.propose().state == S.AWAITING_APPROVAL


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE audit_auditevent SET actor='mallory' WHERE id=2",
        "DELETE FROM audit_auditevent WHERE id=2",
        "DELETE FROM audit_auditevent WHERE id=(SELECT max(id) FROM audit_auditevent)",
    ],
)
def test_damage_to_the_audit_log_is_found(stage: Stage, damage: str) -> None:
    stage.propose()
    triggers.remove(connection)
    with connection.cursor() as cursor:
        cursor.execute(damage)
    assert not verify_chain().verified


def test_an_event_that_was_changed_with_its_own_hash_is_found_by_the_next_one(
    stage: Stage,
) -> None:
    stage.propose()
    triggers.remove(connection)
    event = AuditEvent.objects.get(pk=2)
    event.actor = "mallory"
    AuditEvent.objects.filter(pk=2).update(actor=event.actor, hash=event_hash(event))
    report = verify_chain()
    assert (report.event_id, report.verified) == (3, False), report


def test_the_database_refuses_to_change_the_audit_log(stage: Stage) -> None:
    triggers.install(connection)
    for statement in ("UPDATE audit_auditevent SET actor='x'", "DELETE FROM audit_auditevent"):
        with pytest.raises(DatabaseError), transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(statement)
    assert AuditHead.objects.get().last_id == AuditEvent.objects.count()


def test_what_is_in_doubt_is_taken_out_when_its_trainer_reports_without_a_restart(
    stage: Stage,
) -> None:
    adaptation = stage.grafted(stage.propose())
    with transaction.atomic():
        transition(adaptation, S.IN_DOUBT, actor=TAMIYO, reason="the trainer was silent")
    Run.objects.update(last_seen_at=timezone.now())
    services.sweep()
    adaptation.refresh_from_db()
    assert adaptation.state == S.IN_DOUBT  # its hello may still come
    Adaptation.objects.update(changed_at=timezone.now() - timedelta(minutes=2))
    services.sweep()
    stage.ack(stage.command(adaptation), CommandState.APPLIED)  # the model holds it
    adaptation.refresh_from_db()
    assert adaptation.state == S.ROLLING_BACK
    stage.ack(stage.command(adaptation), CommandState.APPLIED, digest_after="a" * 64)
    adaptation.refresh_from_db()
    assert adaptation.state == S.ROLLED_BACK


def test_a_late_answer_to_an_undo_ends_what_was_thought_to_be_grafted(stage: Stage) -> None:
    adaptation = stage.grafted(stage.propose())
    with transaction.atomic():
        transition(adaptation, S.ROLLING_BACK, actor=TAMIYO)
        request_undo(adaptation, reason="test")
        transition(adaptation, S.IN_DOUBT, actor=TAMIYO)
        transition(adaptation, S.PROBATION, actor=TAMIYO)
    stage.ack(stage.command(adaptation), CommandState.APPLIED, digest_after="a" * 64)
    adaptation.refresh_from_db()
    assert adaptation.state == S.ROLLED_BACK
