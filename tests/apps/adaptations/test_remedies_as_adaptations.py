"""A remedy lives as a graft does: proposed, decided, sent, applied, judged, taken back."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from django.utils import timezone

from apps.adaptations import services
from apps.adaptations.models import Adaptation
from apps.adaptations.proposals import GateClosedError
from apps.adaptations.services import sweep
from apps.audit.models import AuditEvent
from apps.policies.services import adaptation_switch
from apps.rest.problems import Problem
from apps.runs.models import Command, Run
from apps.trainers import services as trainers
from apps.violations.models import Violation
from esper.contracts import (
    AdaptationState,
    CommandKind,
    CommandState,
    Finding,
    Risk,
    RunMode,
    Severity,
    ViolationRule,
)
from esper.contracts.protocol import Applied, HeldRemedy, RemedyProposal, RemedyVerdict, Telemetry
from tests.apps.callers import Caller, Trainer
from tests.apps.cast import TRAINER, make_remedies, make_run
from tests.apps.stage import Stage

S = AdaptationState
FINDING = Finding(
    rule=ViolationRule.DIAGNOSIS,
    layer="fc",
    severity=Severity.SERIOUS,
    observed="the loss rises and falls by 0.3 around 1.2",
    limit="changes below 0.1",
    remedy="lower the learning rate",
    slug="oscillating_loss",
    since_step=940,
)
HARD = {"digest_before": "a" * 64, "digest_after": "b" * 64}


@pytest.fixture(autouse=True)
def _catalogue(db: None) -> None:
    make_remedies()


def proposal(stage: Stage, key: str = "k1", **changes: Any) -> RemedyProposal:
    base = RemedyProposal(
        epoch=stage.run.epoch,
        key=key,
        step=stage.run.step,
        remedy="set_lr",
        layer="",
        config={"factor": 0.5},
        finding=FINDING,
    )
    return msgspec.structs.replace(base, **changes)


def propose(stage: Stage, key: str = "k1", **changes: Any) -> Adaptation:
    wanted = proposal(stage, key, **changes)
    return services.propose_remedy(run=stage.run, proposal=wanted, actor=TRAINER)


def set_mode(stage: Stage, mode: RunMode) -> None:
    Run.objects.filter(pk=stage.run.pk).update(mode=mode)
    stage.run.refresh_from_db()


def applied(stage: Stage, adaptation: Adaptation) -> Adaptation:
    command = stage.command(adaptation)
    stage.ack(command, CommandState.ACCEPTED)
    details = {"factor": 0.5}
    stage.ack(command, CommandState.APPLIED, step=1003, pause_ms=1.5, details=details, **HARD)
    adaptation.refresh_from_db()
    assert adaptation.state == S.PROBATION
    return adaptation


def judge(stage: Stage, adaptation: Adaptation, *, keep: bool, hard: bool = False) -> Adaptation:
    verdict = RemedyVerdict(
        epoch=stage.run.epoch,
        adaptation=adaptation.uid,
        keep=keep,
        reason="“The loss oscillates” is over" if keep else "“The loss oscillates” is still open",
        step=1100,
        steps_observed=97,
        hard=hard,
    )
    services.judge_remedy(run=stage.run, verdict=verdict, actor=TRAINER)
    adaptation.refresh_from_db()
    return adaptation


def taken_back(stage: Stage, adaptation: Adaptation, **ack: Any) -> Adaptation:
    command = stage.command(adaptation)
    assert command.kind == CommandKind.UNDO
    stage.ack(command, CommandState.APPLIED, step=1200, **ack)
    adaptation.refresh_from_db()
    return adaptation


def move_on(stage: Stage, steps: int) -> None:
    Run.objects.filter(pk=stage.run.pk).update(step=stage.run.step + steps)
    stage.run.refresh_from_db()


def test_a_low_risk_remedy_goes_by_rule_and_is_kept_when_its_finding_is_over(
    stage: Stage,
) -> None:
    adaptation = propose(stage)
    assert (adaptation.state, adaptation.title) == (S.DISPATCHED, "Halve the learning rate")
    assert (
        adaptation.decided_rule == "policy v1: risk low needs no person, and it can be taken back"
    )
    command = stage.command(adaptation)
    assert command.kind == CommandKind.REMEDY
    assert command.payload == {
        "remedy": "set_lr",
        "config": {"factor": 0.5},
        "finding": "oscillating_loss",
    }
    judge(stage, applied(stage, adaptation), keep=True)
    assert (adaptation.state, adaptation.end_reason) == (S.KEPT, "“The loss oscillates” is over")
    assert stage.command(adaptation).kind == CommandKind.KEEP
    acts = AuditEvent.objects.filter(object_uid=adaptation.uid).order_by("id")
    assert [event.act.removeprefix("adaptation.") for event in acts] == [
        *("proposed", "approved", "dispatched", "accepted", "probation", "kept"),
    ]
    assert acts[0].data["title"] == "Halve the learning rate"


def test_a_remedy_that_did_not_help_ends_and_keeps_what_was_learned(stage: Stage) -> None:
    adaptation = judge(stage, applied(stage, propose(stage)), keep=False)
    assert adaptation.state == S.ROLLING_BACK
    assert stage.command(adaptation).payload["hard"] is False
    taken_back(stage, adaptation, digest_after="c" * 64)
    assert (adaptation.state, adaptation.undo_exact) == (S.ROLLED_BACK, None)


def test_a_remedy_that_did_harm_is_taken_back_to_the_state_before_it(stage: Stage) -> None:
    adaptation = judge(stage, applied(stage, propose(stage)), keep=False, hard=True)
    assert stage.command(adaptation).payload["hard"] is True
    taken_back(stage, adaptation, digest_after="a" * 64)
    assert (adaptation.state, adaptation.undo_exact) == (S.ROLLED_BACK, True)


@pytest.mark.parametrize(("exact", "digest"), [(True, "a"), (False, "c")])
def test_a_person_takes_a_remedy_back_exactly(stage: Stage, exact: bool, digest: str) -> None:
    adaptation = applied(stage, propose(stage))
    services.roll_back_adaptation(
        adaptation=adaptation,
        user=stage.operator,
        via="page",
        version=adaptation.version,
        reason="the rate was right",
    )
    assert stage.command(adaptation).payload["hard"] is True
    taken_back(stage, adaptation, digest_after=digest * 64, details={"exact": exact})
    assert (adaptation.state, adaptation.undo_exact) == (S.ROLLED_BACK, exact)
    # It does not come back at once, although the fault is still there.
    move_on(stage, 10)
    with pytest.raises(Problem, match="declined or taken back"):
        propose(stage, "k2")


@pytest.mark.parametrize(
    ("mode", "changes", "why"),
    [
        (RunMode.SUPERVISED, {}, "supervised"),
        (RunMode.AUTOMATIC, {"remedy": "rewind", "config": {"step": 900}}, "Risk is medium"),
        (RunMode.AUTOMATIC, {"asks": ("the trainer is unsure",)}, "the trainer is unsure"),
    ],
)
def test_a_person_is_asked(stage: Stage, mode: RunMode, changes: dict[str, Any], why: str) -> None:
    set_mode(stage, mode)
    adaptation = propose(stage, **changes)
    assert adaptation.state == S.AWAITING_APPROVAL
    assert why in " ".join(adaptation.asks)
    assert not Command.objects.exists()
    approved = services.approve_adaptation(
        adaptation=adaptation,
        user=stage.operator,
        via="page",
        version=adaptation.version,
        evidence_hash=adaptation.evidence_hash,
    )
    assert approved.state == S.DISPATCHED
    with pytest.raises(Problem, match="dispatched already"):
        services.approve_adaptation(
            adaptation=adaptation,
            user=stage.second,
            via="page",
            version=adaptation.version,
            evidence_hash=adaptation.evidence_hash,
        )


def test_a_rewind_is_told_in_words(stage: Stage) -> None:
    adaptation = propose(stage, remedy="rewind", config={"step": 5800})
    assert adaptation.title == "Rewind to step 5,800 and halve the learning rate"


def test_an_observed_run_and_a_killed_switch_get_no_remedy(stage: Stage) -> None:
    set_mode(stage, RunMode.OBSERVE)
    with pytest.raises(Problem, match="only observed"):
        propose(stage)
    set_mode(stage, RunMode.AUTOMATIC)
    switch = adaptation_switch()
    switch.on, switch.changed_by = False, "olga"
    switch.save()
    with pytest.raises(Problem, match="olga has switched adaptation off"):
        propose(stage)
    assert not Adaptation.objects.exists()


def test_old_evidence_is_refused(stage: Stage) -> None:
    stage.run.last_seen_at = timezone.now() - timedelta(seconds=500)
    stage.run.save()
    with pytest.raises(Problem, match="evidence is 500 s old"):
        propose(stage)


def test_the_same_finding_is_answered_once(stage: Stage) -> None:
    set_mode(stage, RunMode.SUPERVISED)
    first = propose(stage)
    assert propose(stage) == first  # sent again
    assert propose(stage, "k2") == first  # by a trainer that was started again
    assert Adaptation.objects.count() == 1


def test_a_proposal_to_a_trainer_that_is_gone_is_replaced(stage: Stage) -> None:
    set_mode(stage, RunMode.SUPERVISED)
    first = propose(stage)
    stage.restart_trainer()
    set_mode(stage, RunMode.SUPERVISED)
    second = propose(stage, "k2")
    first.refresh_from_db()
    assert (first.state, second.state) == (S.SUPERSEDED, S.AWAITING_APPROVAL)


def test_an_unanswered_proposal_does_not_silence_others(stage: Stage) -> None:
    set_mode(stage, RunMode.SUPERVISED)
    for number in range(4):
        other = replace(FINDING, slug=f"fault_{number}")
        assert propose(stage, f"k{number}", finding=other).state == S.AWAITING_APPROVAL
    assert stage.waiting(layer="head").state == S.AWAITING_APPROVAL  # a graft


def test_one_remedy_at_a_time_but_a_critical_finding_does_not_wait(stage: Stage) -> None:
    propose(stage)
    other = replace(FINDING, slug="plateau")
    with pytest.raises(Problem, match="is not known yet"):
        propose(stage, "k2", finding=other)
    critical = replace(other, slug="non_finite", severity=Severity.CRITICAL)
    skipping = propose(stage, "k3", remedy="skip_update", config={}, finding=critical)
    assert skipping.state == S.DISPATCHED


def test_twice_by_rule_and_then_a_person(stage: Stage) -> None:
    for key in ("k1", "k2"):
        adaptation = propose(stage, key)
        assert adaptation.state == S.DISPATCHED
        judge(stage, applied(stage, adaptation), keep=True)
    third = propose(stage, "k3")
    assert third.state == S.AWAITING_APPROVAL
    assert "applied 2 times by rule" in " ".join(third.asks)


@pytest.mark.parametrize("ending", ["rejected", "expired"])
def test_a_declined_proposal_does_not_come_back_at_once(stage: Stage, ending: str) -> None:
    set_mode(stage, RunMode.SUPERVISED)
    adaptation = propose(stage)
    if ending == "rejected":
        services.reject_adaptation(
            adaptation=adaptation,
            user=stage.operator,
            via="page",
            version=adaptation.version,
            reason="no",
        )
    else:
        Adaptation.objects.update(deadline_at=timezone.now() - timedelta(seconds=1))
        sweep()
    adaptation.refresh_from_db()
    assert adaptation.state == ending
    assert propose(stage) == adaptation  # what became of it
    with pytest.raises(Problem, match="0 steps ago; the cooldown is 400 steps"):
        propose(stage, "k2")
    other = propose(stage, "k3", remedy="clip_layer", config={})
    assert other.state == S.AWAITING_APPROVAL
    Adaptation.objects.filter(pk=other.pk).update(state=S.SUPERSEDED)
    move_on(stage, 400)
    assert propose(stage, "k4").state == S.AWAITING_APPROVAL


def test_a_proposal_whose_finding_is_over_is_withdrawn(stage: Stage) -> None:
    set_mode(stage, RunMode.SUPERVISED)
    adaptation = propose(stage)
    over = replace(FINDING, resolved_step=1020)
    batch = Telemetry(epoch=stage.run.epoch, seq_from=1, seq_to=1, findings=(over,))
    trainers.take_telemetry(run=stage.run, batch=batch)
    adaptation.refresh_from_db()
    assert adaptation.state == S.SUPERSEDED
    assert adaptation.end_reason == "its finding was over at step 1,020"


def test_a_refusal_of_the_trainer_ends_with_its_sentence(stage: Stage) -> None:
    adaptation = propose(stage)
    reason = "set_lr cannot be applied: the session was given no optimizer"
    stage.ack(stage.command(adaptation), CommandState.ACCEPTED)
    stage.ack(stage.command(adaptation), CommandState.REFUSED, code="does_not_fit", reason=reason)
    adaptation.refresh_from_db()
    assert (adaptation.state, adaptation.end_reason) == (S.NOT_APPLIED, reason)


@pytest.mark.parametrize(
    ("remedy", "held", "step", "end"),
    [
        ("set_lr", True, 1010, S.PROBATION),
        ("set_lr", False, 1010, S.ROLLED_BACK),
        ("restore_best", False, 1010, S.PROBATION),  # it is in what was learned since
        ("restore_best", False, 900, S.ROLLED_BACK),
    ],
)
def test_a_trainer_that_dies_and_returns_settles_its_remedies(
    stage: Stage, remedy: str, held: bool, step: int, end: AdaptationState
) -> None:
    adaptation = propose(stage, remedy=remedy, config={})
    if adaptation.state == S.AWAITING_APPROVAL:
        services.approve_adaptation(
            adaptation=adaptation,
            user=stage.operator,
            via="page",
            version=adaptation.version,
            evidence_hash=adaptation.evidence_hash,
        )
    applied(stage, adaptation)
    stage.restart_trainer()
    adaptation.refresh_from_db()
    assert adaptation.state == S.IN_DOUBT
    trainers.settle_hello(
        run=stage.run,
        epoch=stage.run.epoch,
        step=step,
        applied=(),
        remedies=[HeldRemedy(adaptation=adaptation.uid, step=1003)] if held else [],
        actor=TRAINER,
    )
    adaptation.refresh_from_db()
    assert adaptation.state == end


@pytest.mark.parametrize("kept", [False, True])
def test_a_held_remedy_that_a_restored_database_does_not_know_gets_its_row_again(
    stage: Stage, kept: bool
) -> None:
    adaptation = applied(stage, propose(stage))
    row = Adaptation.objects.get(pk=adaptation.pk)
    row.uid, row.pk = f"{row.uid[:-4]}GONE", None  # as the backup does not have it
    services.note_restored(actor=TRAINER)
    stage.run.refresh_from_db()
    entry = HeldRemedy(
        adaptation=row.uid, step=1003, remedy="set_lr", config={"factor": 0.25},
        finding="loss_spike", kept=kept,
    )  # fmt: skip
    known = HeldRemedy(adaptation=adaptation.uid, step=1003, remedy="set_lr", kept=kept)
    for _ in range(2):  # a hello is repeated until it is answered
        trainers.settle_hello(
            run=stage.run,
            epoch=stage.run.epoch,
            step=1100,
            applied=(),
            remedies=[entry, known],
            actor=TRAINER,
        )
    found = Adaptation.objects.get(uid=row.uid)
    assert (found.state, found.title, found.finding, found.graft_step) == (
        *(S.KEPT if kept else S.PROBATION, "Divide the learning rate by 4"),
        *("loss_spike", 1003),
    )
    adaptation.refresh_from_db()
    assert adaptation.state == found.state
    assert Violation.objects.get(adaptation_uid=found.uid).observed == "set_lr for the whole run"
    acts = AuditEvent.objects.filter(object_uid=found.uid).values_list("act", flat=True)
    assert "adaptation.recovered" in acts


def test_the_beginning_of_a_recovered_span_is_known_again(stage: Stage) -> None:
    services.note_restored(actor=TRAINER)
    stage.run.refresh_from_db()
    entry = Applied(
        adaptation="adp_span", layer="fc", since="conv", blueprint=stage.blueprint.slug, step=5
    )
    trainers.settle_hello(
        run=stage.run, epoch=stage.run.epoch, step=9, applied=[entry], actor=TRAINER
    )
    assert Adaptation.objects.get(uid="adp_span").since == "conv"


def test_a_remedy_without_a_verdict_is_ended_at_the_deadline(stage: Stage) -> None:
    adaptation = applied(stage, propose(stage))
    Adaptation.objects.update(deadline_at=timezone.now() - timedelta(seconds=1))
    sweep()
    adaptation.refresh_from_db()
    assert adaptation.state == S.ROLLING_BACK
    assert stage.command(adaptation).payload["hard"] is False


def ask(stage: Stage, who: str, **changes: Any) -> Adaptation:
    user = {"operator": stage.operator, "owner": stage.owner, "viewer": stage.viewer}[who]
    wanted = {"remedy": "set_lr", "layer": "", "config": {"factor": 0.1}, "reason": "too fast"}
    return services.ask_for_remedy(run=stage.run, user=user, via="page", **{**wanted, **changes})


def test_people_ask_for_remedies(stage: Stage) -> None:
    by_operator = ask(stage, "operator")
    assert by_operator.state == S.DISPATCHED
    assert (by_operator.decided_by, by_operator.proposed_by) == (stage.operator, stage.operator)
    by_owner = ask(stage, "owner")  # who must not approve for their own run
    assert by_owner.state == S.AWAITING_APPROVAL
    assert "rafi asks for it." in by_owner.asks
    with pytest.raises(Problem, match="may ask for remedies"):
        ask(stage, "viewer")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"remedy": "prayer"}, "no remedy called 'prayer'"),
        ({"layer": "nose"}, "no layer called 'nose'"),
        ({"remedy": "rewind", "layer": "fc"}, "for the whole run"),
        ({"config": {"speed": 1}}, "no setting 'speed'; its settings are: factor"),
        ({"config": {"factor": "fast"}}, "factor of set_lr cannot be 'fast'"),
        ({"config": {"factor": True}}, "factor of set_lr cannot be True"),
        ({"remedy": "stop_early", "config": {"restore_best": 1}}, "cannot be 1"),
        ({"remedy": "rewind", "config": {"step": 0.5}}, "step of rewind cannot be 0.5"),
    ],
)
def test_a_remedy_that_cannot_be_is_refused_with_what_is_wrong(
    stage: Stage, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(Problem, match=why):
        ask(stage, "operator", **changes)


@pytest.mark.parametrize("who", ["operator", "owner"])
@pytest.mark.parametrize("remedy", ["evaluate_now", "checkpoint_now"])
def test_what_changes_nothing_needs_no_approval_and_goes_in_an_observed_run(
    stage: Stage, who: str, remedy: str
) -> None:
    set_mode(stage, RunMode.OBSERVE)
    asked = ask(stage, who, remedy=remedy, config={})
    assert (asked.state, asked.decided_by) == (S.DISPATCHED, None)
    assert asked.decided_rule == "it changes nothing, so nobody must approve it"
    kept = judge(stage, applied(stage, asked), keep=True)
    assert kept.state == S.KEPT
    with pytest.raises(GateClosedError):
        ask(stage, who, remedy="hold_lr", config={"value": 0.01})


def test_people_ask_for_a_rate_by_its_value(stage: Stage) -> None:
    asked = ask(stage, "operator", remedy="hold_lr", config={"value": 3e-4})
    assert asked.title == "Set the learning rate to 0.0003"
    assert stage.command(asked).payload["config"] == {"value": 3e-4}


def test_the_endpoints(trainer: Trainer, operator: Caller, viewer: Caller) -> None:
    uid = trainer.run
    body = {"remedy": "set_lr", "config": {"factor": 0.1}}
    assert viewer.post(f"runs/{uid}/ask-for-remedy", body).status == 403
    asked = operator.post(f"runs/{uid}/ask-for-remedy", body)
    assert (asked.status, asked.data["kind"], asked.data["blueprint"]) == (201, "remedy", None)
    assert asked.data["title"] == "Divide the learning rate by 10"
    known = operator.get("remedies")
    assert "rewind" in [entry["slug"] for entry in known.data["results"]]
    sent = trainer.post(
        f"{trainer.path}/remedy-proposals",
        {
            **{"epoch": 1, "key": "k", "step": 5, "remedy": "set_lr", "layer": ""},
            "finding": msgspec.to_builtins(replace(FINDING, severity=Severity.CRITICAL)),
        },
    )
    assert (sent.status, sent.data["state"]) == (200, "dispatched")
    listed = operator.get("adaptations?remedy=set_lr&finding=oscillating_loss")
    assert [entry["uid"] for entry in listed.data["results"]] == [sent.data["adaptation"]]
    assert operator.get(f"adaptations/{sent.data['adaptation']}").data["found"]["layer"] == "fc"
    assert listed.data["results"][0]["risk"] == Risk.LOW


def test_a_resumed_run_is_asked_again_by_nobody(stage: Stage) -> None:
    """The snapshot that Tamiyo reads has no remedy in it, which it could not judge."""
    from apps.adaptations.selectors import run_snapshot

    propose(stage)
    make_run(stage.owner)
    snapshot = run_snapshot(stage.run)
    assert (snapshot.active, snapshot.in_flight, snapshot.history) == ((), 0, {})
