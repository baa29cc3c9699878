"""A decision is stored with what it was made on, and can be made again from there."""

from __future__ import annotations

import base64
import time
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import msgspec
import pytest
from click import ClickException

from apps.accounts.models import User
from apps.adaptations import services
from apps.adaptations.decisions import DECLINES_KEPT
from apps.adaptations.models import Adaptation, DecisionRecord
from apps.blueprints.services import sync_catalogue
from apps.runs.models import Run
from esper import blueprints
from esper.contracts import Decision, Declined, Role, SafetyPolicy, protocol, wire
from esper.contracts.protocol import Snapshot
from esper.pipeline import decide
from esper.policy import HeuristicPolicy
from esper.replay import decision_rng, pack_snapshot, replay, run_snapshot
from esper.services.tamiyo.wire import decline_of, proposal_of, report_from_wire
from launcher.command import cli
from tests.apps.callers import Caller, Trainer, frame, metrics, register
from tests.esper.recorded.record import LAYERS, flat_loss

pytestmark = pytest.mark.django_db


@pytest.fixture
def flat_run(people: dict[Role, User]) -> Trainer:
    """A run that lacks capacity, so that Tamiyo wants to help."""
    sync_catalogue()
    layers = [layer.to_wire() for layer in LAYERS]
    trainer = register(people[Role.RESEARCHER], name="flat", layers=layers)
    seen = flat_loss()
    frames = [
        {**wire.to_wire(protocol.Frame.of(one)), "wall_time": time.time()} for one in seen.frames
    ]
    losses = [
        metrics(int(step), loss=float(loss))
        for step, loss in zip(seen.loss_steps, seen.loss, strict=True)
    ]
    found = [wire.to_wire(finding) for finding in seen.findings]
    assert trainer.send(frames=frames, metrics=losses, findings=found).status == 202
    return trainer


def decided(trainer: Trainer, tamiyo: Caller, **changes: Any) -> tuple[Any, Any, SafetyPolicy]:
    """What Tamiyo does: read the snapshot, and decide on it."""
    report = report_from_wire(tamiyo.get(f"{trainer.path}/snapshot").data)
    limits = report.limits
    snapshot = report.snapshot
    answer = decide(
        snapshot, HeuristicPolicy(), blueprints.list_blueprints(), limits, decision_rng(snapshot)
    )
    return answer, snapshot, limits


def proposed(trainer: Trainer, tamiyo: Caller) -> tuple[Adaptation, Decision]:
    decision, snapshot, limits = decided(trainer, tamiyo)
    assert isinstance(decision, Decision)
    message = proposal_of(decision, snapshot, limits)
    answer = tamiyo.post(
        f"{trainer.path}/adaptations",
        wire.to_wire(message),
        **{"Idempotency-Key": message.key(trainer.run)},
    )
    assert answer.status == 201, answer.data
    return Adaptation.objects.get(uid=answer.data["uid"]), decision


def esper(*words: str) -> str:
    buffer = StringIO()
    with redirect_stdout(buffer):
        cli.main(list(words), standalone_mode=False)
    return buffer.getvalue()


def test_a_proposal_is_read_back_and_decided_again_the_same(
    flat_run: Trainer, tamiyo: Caller, viewer: Caller
) -> None:
    adaptation, decision = proposed(flat_run, tamiyo)
    stored = viewer.get(f"adaptations/{adaptation.uid}/snapshot")
    assert stored.status == 200
    again = replay(wire.from_wire(Snapshot, stored.data))
    assert repr(again) == repr(decision)
    (row,) = viewer.get(f"{flat_run.path}/decisions").data["results"]
    assert (row["adaptation"], row["layer"], row["note"]) == (adaptation.uid, "fc2", "")
    assert row["message"]["blueprint"] == decision.blueprint
    assert row["message"]["snapshot"] is None
    assert viewer.get(f"decisions/{row['uid']}/snapshot").data == stored.data


def test_the_command_prints_the_same_decision(flat_run: Trainer, tamiyo: Caller) -> None:
    adaptation, decision = proposed(flat_run, tamiyo)
    for name in (f"A-{adaptation.number}", str(adaptation.number), adaptation.uid):
        printed = esper("replay", name)
        assert f"at fc2: {decision.blueprint}" in printed
        assert printed.endswith("The same as the recorded decision.\n")


def test_the_command_says_what_has_changed_and_exits_with_1(
    flat_run: Trainer, tamiyo: Caller
) -> None:
    adaptation, _ = proposed(flat_run, tamiyo)
    record = DecisionRecord.objects.get(adaptation=adaptation)
    record.message["risk"] = "high"
    record.save()
    with pytest.raises(SystemExit) as exit_status:
        esper("replay", adaptation.uid)
    assert exit_status.value.code == 1
    assert services.replay_decision(record).differences == ("risk",)


@pytest.mark.parametrize("name", ["A-999", "adp_nobody", "A-", "", "A-" + "9" * 30])
def test_the_command_refuses_an_unknown_decision(name: str) -> None:
    with pytest.raises(ClickException, match="no such recorded decision"):
        esper("replay", name)


def a_decline(trainer: Trainer, tamiyo: Caller) -> tuple[protocol.Decline, Declined]:
    """The same run, on a day with as many adaptations as are allowed."""
    report = report_from_wire(tamiyo.get(f"{trainer.path}/snapshot").data)
    snapshot = run_snapshot(
        msgspec.structs.replace(
            wire.from_wire(Snapshot, tamiyo.get(f"{trainer.path}/snapshot").data),
            adaptations_today=report.limits.max_adaptations_per_day,
            age_seconds=1.0,
        )
    )
    declined = decide(
        snapshot,
        HeuristicPolicy(),
        blueprints.list_blueprints(),
        report.limits,
        decision_rng(snapshot),
    )
    assert isinstance(declined, Declined)
    return decline_of(declined, snapshot, report.limits, policy=HeuristicPolicy.name), declined


def test_a_decline_is_stored_and_decided_again_the_same(
    flat_run: Trainer, tamiyo: Caller, viewer: Caller
) -> None:
    message, declined = a_decline(flat_run, tamiyo)
    assert tamiyo.post(f"{flat_run.path}/declines", wire.to_wire(message)).status == 201
    (row,) = viewer.get(f"{flat_run.path}/decisions").data["results"]
    assert row["adaptation"] is None
    stored = wire.from_wire(Snapshot, viewer.get(f"decisions/{row['uid']}/snapshot").data)
    assert repr(replay(stored)) == repr(declined)
    assert "The same as the recorded decision." in esper("replay", row["uid"])


def test_only_the_newest_declines_are_kept(flat_run: Trainer, tamiyo: Caller) -> None:
    message, _ = a_decline(flat_run, tamiyo)
    run = Run.objects.get(uid=flat_run.run)
    adaptation, _ = proposed(flat_run, tamiyo)
    rows = [
        DecisionRecord(run=run, run_epoch=1, step=step, layer="fc2", message={})
        for step in range(DECLINES_KEPT + 20)
    ]
    DecisionRecord.objects.bulk_create(rows)
    assert tamiyo.post(f"{flat_run.path}/declines", wire.to_wire(message)).status == 201
    assert DecisionRecord.objects.filter(run=run, adaptation=None).count() == DECLINES_KEPT
    assert DecisionRecord.objects.filter(adaptation=adaptation).exists()


def test_a_decision_without_a_snapshot_says_why(
    flat_run: Trainer, tamiyo: Caller, viewer: Caller
) -> None:
    message, _ = a_decline(flat_run, tamiyo)
    note = "This decision cannot be replayed: the snapshot is too large."
    body = {**wire.to_wire(message), "snapshot": None, "snapshot_note": note}
    assert tamiyo.post(f"{flat_run.path}/declines", body).status == 201
    (row,) = viewer.get(f"{flat_run.path}/decisions").data["results"]
    missing = viewer.get(f"decisions/{row['uid']}/snapshot")
    assert (missing.status, missing.code) == (404, "not-found")
    assert missing.data["detail"] == row["note"] == note
    with pytest.raises(ClickException, match="too large"):
        esper("replay", row["uid"])


@pytest.mark.parametrize("change", ["garbage", "another run", "too large"])
def test_a_snapshot_that_is_none_is_refused_with_its_place(
    flat_run: Trainer, tamiyo: Caller, change: str
) -> None:
    message, _ = a_decline(flat_run, tamiyo)
    theirs = wire.from_wire(Snapshot, tamiyo.get(f"{flat_run.path}/snapshot").data)
    bodies = {
        "garbage": b"garbage",
        "another run": pack_snapshot(msgspec.structs.replace(theirs, run="run_other")),
        "too large": b"0" * (protocol.MAX_SNAPSHOT_BYTES + 1),
    }
    snapshot = base64.b64encode(bodies[change]).decode()
    body = {**wire.to_wire(message), "snapshot": snapshot}
    refused = tamiyo.post(f"{flat_run.path}/declines", body)
    assert (refused.status, refused.code) == (400, "invalid")
    assert refused.data["errors"][0]["pointer"] == "/snapshot"
    assert not DecisionRecord.objects.exists()


def test_a_frame_brings_its_loss_with_it(trainer: Trainer, tamiyo: Caller, viewer: Caller) -> None:
    trainer.send(frames=[{**frame(10), "loss": 0.75}, {**frame(20), "loss": "nan"}])
    snapshot = report_from_wire(tamiyo.get(f"{trainer.path}/snapshot").data).snapshot
    assert snapshot.loss_steps.tolist() == [10, 20]
    assert snapshot.loss[0] == 0.75
    assert str(snapshot.loss[1]) == "nan"
    rows = tamiyo.get(f"{trainer.path}/frames?after_step=0").data["results"]
    assert [row["loss"] for row in rows] == [0.75, "nan"]
    assert viewer.get(trainer.path).data["last_loss"] == "nan"
