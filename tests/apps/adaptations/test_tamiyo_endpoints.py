"""What Tamiyo calls, parsed by Tamiyo's own code."""

from __future__ import annotations

import math

import pytest

from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.blueprints.models import Blueprint
from apps.violations.models import Violation
from apps.workers.models import Worker
from esper.contracts import AdaptationState
from esper.reward import Look
from esper.services.tamiyo import wire
from tests.apps.callers import Caller, Inbox, Trainer, frame, metrics, proposal, shown
from tests.apps.cast import force_state

pytestmark = pytest.mark.django_db


def test_a_snapshot_is_all_that_a_decision_looks_at(inbox: Inbox, tamiyo: Caller) -> None:
    trainer = inbox.trainer
    uid = inbox.waiting().uid
    trainer.send(
        frames=[frame(1010, float("nan"))],
        metrics=[
            metrics(
                1010, loss="nan", **{f"ablation_gain:{uid}": 0.125, f"ablation_loss:{uid}": 2.0}
            )
        ],
    )
    report = wire.report_from_wire(tamiyo.get(f"{trainer.path}/snapshot").data)
    snapshot = report.snapshot
    assert (snapshot.run, snapshot.epoch, snapshot.step) == (trainer.run, 1, 1010)
    assert [frame.step for frame in snapshot.frames] == [1000, 1010]
    assert snapshot.loss_steps.tolist() == [1000, 1010]
    assert snapshot.loss[0] == 1.0
    assert math.isnan(snapshot.loss[1])
    assert report.looks == {uid: (Look(1010, 0.125, 2.0),)}
    assert set(snapshot.history) == {"fc"}
    assert snapshot.history["fc"].in_flight
    assert (snapshot.in_flight, snapshot.frozen) == (1, "")
    active = report.active[0]
    assert (active.uid, active.state, active.kind) == (uid, "awaiting_approval", "parallel")
    assert report.limits.confidence_auto == 0.75


def test_a_restarted_trainer_takes_back_the_steps_beyond_its_checkpoint(
    inbox: Inbox, tamiyo: Caller, viewer: Caller
) -> None:
    from apps.runs.models import Run

    trainer = inbox.trainer
    Run.objects.filter(uid=trainer.run).update(epoch=2, telemetry_seq=0)
    trainer.epoch, trainer.seq = 2, 0
    trainer.send(frames=[frame(990)], metrics=[metrics(989, loss=2.0), metrics(990, loss=1.9)])
    snapshot = wire.report_from_wire(tamiyo.get(f"{trainer.path}/snapshot").data).snapshot
    assert snapshot.loss_steps.tolist() == [989, 990]
    assert [frame.step for frame in snapshot.frames] == [990]
    assert viewer.get(f"{trainer.path}/metrics?name=loss").data["step"] == [989, 990]
    assert viewer.get(f"{trainer.path}/heatmap").data["step"] == [990]


def test_newer_frames_come_oldest_first(trainer: Trainer, tamiyo: Caller) -> None:
    trainer.send(frames=[frame(step) for step in (10, 20, 30, 40)])
    answer = tamiyo.get(f"{trainer.path}/frames?after_step=10&limit=2").data
    assert [row["step"] for row in answer["results"]] == [20, 30]
    assert answer["layers"] == ["fc", "head"]


def test_a_proposal_waits_for_a_person_with_everything_they_need_to_know(
    inbox: Inbox, viewer: Caller
) -> None:
    answer = inbox.propose()
    assert answer.status == 201
    assert answer.header("ETag") == f'"{answer.data["version"]}"'
    shown = viewer.get(f"adaptations/{answer.data['uid']}").data
    assert shown["state"] == "awaiting_approval"
    assert shown["evidence"]["act_std"] is None
    assert shown["evidence_now"]["health"] == pytest.approx(0.5)
    assert shown["evidence_drift"] == 0.0
    assert shown["reasons"][0]["observed"] is None
    assert shown["why_not"] == [{"blueprint": "attn_std", "reason": "The layer has no sequence."}]
    assert {check["rule"] for check in shown["checks"]} >= {"frozen", "cooldown", "confidence"}
    assert len(shown["undo_plan"]) >= 3
    assert shown["permissions"]["approve"]["allowed"] is False
    assert shown["permissions"]["approve"]["why"]


def test_a_repeated_proposal_is_one_adaptation(inbox: Inbox) -> None:
    first, second = inbox.propose(), inbox.propose()
    assert second.header("Idempotency-Replayed") == "true"
    assert (second.status, second.data) == (201, first.data)
    assert Adaptation.objects.count() == 1
    other = inbox.propose(confidence=0.61)
    assert (other.status, other.code) == (422, "idempotency-mismatch")


def test_a_closed_gate_names_the_checks_and_leaves_a_violation(inbox: Inbox) -> None:
    forecast = {"parameters": 2048, "flops": 1, "memory_mib": 1e6, "latency_ms": "nan"}
    for _ in range(2):
        refused = inbox.propose(forecast=forecast)
        assert (refused.status, refused.code) == (409, "gate-closed")
        assert "memory" in {check["rule"] for check in refused.data["checks"]}
    assert not Adaptation.objects.exists()
    violation = Violation.objects.filter(rule="memory").first()
    assert violation is not None
    assert (violation.layer, violation.step) == ("fc", 1000)


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"blueprint": "no_such_thing"}, 422, "unknown-blueprint"),
        ({"layer": "nowhere"}, 422, "unknown-layer"),
        ({"epoch": 7}, 409, "old-epoch"),
        ({"adaptation_type": "add_magic"}, 400, "invalid"),
        ({"confidence": "high"}, 400, "invalid"),
        ({"forecast": {}}, 400, "invalid"),
        ({"evidence": {"loss": [1]}}, 400, "invalid"),
        ({"checks": [{"rule": "taste"}]}, 400, "invalid"),
    ],
)
def test_a_proposal_that_makes_no_sense_is_refused(
    inbox: Inbox, changes: dict[str, object], status: int, code: str
) -> None:
    refused = inbox.propose(**changes)
    assert (refused.status, refused.code) == (status, code)
    assert not Adaptation.objects.exists()


def test_a_decline_writes_the_limits_that_were_broken(inbox: Inbox, tamiyo: Caller) -> None:
    check = {
        "rule": "latency",
        "passed": False,
        "hard": True,
        "observed": "12 ms",
        "limit": "10 ms",
        "text": "It would take too long.",
    }
    body = {
        "epoch": 1,
        "step": 1000,
        "layer": "fc",
        "adaptation_type": "add_ffn",
        "confidence": 0.8,
        "reasons": ["too slow"],
        "checks": [check, {**check, "rule": "memory", "passed": True}],
    }
    assert tamiyo.post(f"{inbox.trainer.path}/declines", body).status == 201
    violation = Violation.objects.get()
    assert (violation.rule, violation.observed) == ("latency", "12 ms")


def test_a_verdict_ends_probation_once(inbox: Inbox, tamiyo: Caller) -> None:
    adaptation = inbox.waiting()
    body = {
        "keep": True,
        "reason": "It helps.",
        "ablation_gain": 0.02,
        "forecast_gain": 0.03,
        "forecast_interval": "nan",
        "steps_observed": 150,
        "reward": {"gain": 0.5, "rent": -0.1},
    }
    path = f"adaptations/{adaptation.uid}/verdict"
    early = tamiyo.post(path, body)
    assert (early.status, early.code) == (409, "decision-not-pending")
    force_state(adaptation, AdaptationState.PROBATION, graft_step=1005)
    key = {"Idempotency-Key": f"{adaptation.uid}:verdict"}
    first = tamiyo.post(path, body, **key)
    assert (first.status, first.data["state"]) == (200, "kept")
    assert first.data["reward"] == pytest.approx(0.4)
    assert tamiyo.post(path, body, **key).data == first.data
    late = tamiyo.post(path, {**body, "keep": False})
    assert (late.status, late.code) == (409, "decision-not-pending")
    experience = tamiyo.get("experience").data["results"]
    assert experience == [
        {"blueprint": "proj_lora_64", "kept": 1, "rolled_back": 0, "mean_reward": 0.4}
    ]
    written = AuditEvent.objects.get(act="adaptation.kept")
    assert (written.actor_kind, written.actor) == ("tamiyo", "tamiyo")


def test_people_cannot_speak_for_tamiyo(inbox: Inbox, operator: Caller) -> None:
    for path, body in (
        (f"{inbox.trainer.path}/adaptations", proposal()),
        (f"{inbox.trainer.path}/declines", {}),
        ("services/tamiyo/heartbeat", {"instance": "here", "status": {}}),
    ):
        assert operator.post(path, body).code == "insufficient-scope"


def test_tamiyo_cannot_approve_what_it_proposed(inbox: Inbox, tamiyo: Caller) -> None:
    adaptation = inbox.waiting()
    refused = tamiyo.act(
        f"adaptations/{adaptation.uid}/approve", shown(adaptation), version=adaptation.version
    )
    assert (refused.status, refused.code) == (403, "insufficient-scope")


def test_a_heartbeat_shows_tamiyo_among_the_workers(tamiyo: Caller, viewer: Caller) -> None:
    body = {"instance": "here-17", "status": {"version": "0.1.0", "runs": {}}}
    for _ in range(2):
        assert tamiyo.post("services/tamiyo/heartbeat", body).status == 204
    row = viewer.get("workers").data["results"][0]
    assert (row["name"], row["kind"], row["state"]) == ("tamiyo@here-17", "tamiyo", "idle")
    assert row["capabilities"] == row["queues"] == []
    assert Worker.objects.count() == 1


def test_the_integration_status_has_the_seeds_four_keys(
    inbox: Inbox, viewer: Caller, blueprint: Blueprint
) -> None:
    adaptation = inbox.waiting()
    status = viewer.get("integration-status").data
    assert set(status) == {
        "active_adaptations",
        "blueprint_cache_stats",
        "execution_metrics",
        "safety_violations",
    }
    assert status["active_adaptations"][adaptation.uid]["blueprint"] == blueprint.slug
    assert status["execution_metrics"]["adaptations_by_state"] == {"awaiting_approval": 1}
    assert status["execution_metrics"]["live_runs"] == 1
    assert status["blueprint_cache_stats"]["hit_ratio"] is None
    assert status["safety_violations"] == []
