"""No report is lost, and training goes on, while the server is down or the trainer restarts."""

from __future__ import annotations

import math
import random
from pathlib import Path

from esper.contracts import (
    AdaptationState,
    CommandKind,
)
from esper.grafting import digest
from esper.sdk.transport.client import BackOff
from esper.sdk.transport.journal import JOURNAL_FILE
from tests.esper.sdk.tiny_training import Training, grafts_at
from tests.esper.sdk.transport.attached import (
    attached,
    ended,
    final_ack,
    graft_command,
    kernel_for,
    listening,
)
from tests.esper.sdk.transport.control_plane import ControlPlane, wait_for


def test_a_server_that_is_down_from_the_start_does_not_matter(training: Training) -> None:
    alone = Training().run(40)
    plane = ControlPlane()
    training = Training()
    with attached(training, plane) as session:
        assert training.run(40, session) == alone
        plane.start()
        wait_for(lambda: plane.hellos, "it registers once the server is up")
    assert [entry["step"] for entry in plane.metrics] == list(range(1, 41))
    plane.stop()


def test_a_server_that_dies_and_returns_gets_every_report(
    training: Training, plane: ControlPlane
) -> None:
    with listening(training, plane) as session:
        plane.send(graft_command(plane, 1, kernel_for(session, plane)))
        wait_for(lambda: session._parts.queues and session._parts.queues.inbox, "it is prepared")
        plane.stop()
        training.run(30, session)
        assert [entry.uid for entry in session.adaptations] == ["a1"]
        plane.start()
        training.until(lambda: ended(plane, 1), session)
    assert final_ack(plane, 1)["state"] == "applied"
    steps = [entry["step"] for entry in plane.metrics]
    assert steps == list(range(1, len(steps) + 1))
    assert plane.finishes


def test_reports_outlive_the_trainer(
    training: Training, plane: ControlPlane, tmp_path: Path
) -> None:
    session = listening(training, plane)
    plane.send(graft_command(plane, 1, kernel_for(session, plane)))
    wait_for(lambda: session._parts.queues and session._parts.queues.inbox, "it is prepared")
    plane.stop()
    training.run(3, session)
    session.close(timeout=0.2)
    assert list((tmp_path / "state").glob(f"*/{JOURNAL_FILE}"))

    plane.start()
    other = Training(seed=1)
    plane.uid = "another-run"
    plane.log.clear()
    with attached(other, plane, run="other") as later:
        other.run(1, later)
        wait_for(lambda: plane.finishes, "the reports of the first trainer have arrived")
        journals = tmp_path / "state"
        wait_for(
            lambda: len(list(journals.glob(f"*/{JOURNAL_FILE}"))) == 1, "its journal is removed"
        )
    assert final_ack(plane, 1)["state"] == "applied"
    assert not list((tmp_path / "state").glob(f"*/{JOURNAL_FILE}"))


def test_the_guard_acts_without_the_server_and_reports_when_it_is_back(
    training: Training, plane: ControlPlane
) -> None:
    with listening(training, plane) as session:
        training.run(20, session)
        plane.send(graft_command(plane, 1, kernel_for(session, plane)))
        training.until(lambda: ended(plane, 1), session)
        plane.stop()
        training.run(3, session)
        spoil, training.spoil = training.spoil, lambda loss: loss * math.nan
        training.step(session)
        training.spoil = spoil
        assert session.adaptations[0].state is AdaptationState.ROLLED_BACK
        assert digest(training.model) == final_ack(plane, 1)["digest_before"]
        assert all(math.isfinite(loss) for loss in training.run(5, session))
        plane.start()
        wait_for(lambda: plane.rollbacks, "the rollback is reported")
    (report,) = plane.rollbacks
    assert report["adaptation"] == "a1"
    assert report["rule"] == "non_finite"
    assert report["observed"] == "nan"
    assert report["exact"] is True
    assert report["back_to_step"] == final_ack(plane, 1)["step"]
    assert report["digest_after"] == final_ack(plane, 1)["digest_before"]


def test_a_restarted_trainer_says_what_its_model_really_holds(
    training: Training, plane: ControlPlane
) -> None:
    with listening(training, plane) as session:
        plane.send(graft_command(plane, 1, kernel_for(session, plane)))
        training.until(lambda: ended(plane, 1), session)
        state, weights = session.state_dict(), training.model.state_dict()
    plane.last_command_seq = 1
    plane.settled = [{"adaptation": "a1", "state": "kept"}]
    again = Training(seed=1)
    resumed = attached(again, plane)
    resumed.load_state_dict(state)
    again.model.load_state_dict(weights)
    with resumed:
        again.run(1, resumed)
        wait_for(lambda: len(plane.hellos) == 2, "the second hello is said")
        again.until(lambda: resumed.adaptations[0].state is AdaptationState.KEPT, resumed)
        wait_for(lambda: plane.listeners, "it listens again")
        plane.send(graft_command(plane, 2, "0" * 64, epoch=1), logged=False)
        wait_for(lambda: plane.acks_of(2), "the stale command is refused")
        undo = plane.command(CommandKind.UNDO, 3, adaptation="a1", payload={"hard": True})
        plane.send(undo)
        again.until(lambda: ended(plane, 3), resumed)
    held = {
        **{"adaptation": "a1", "layer": "3", "since": "", "blueprint": "proj_lora_64"},
        **{"merged": False, "kept": False},
    }
    assert plane.hellos[1] == {
        "epoch": 2,
        "last_command_seq": 0,  # its journal was deleted when the run had answered everything
        "step": state["step"] + 1,
        "applied": [{**held, "step": state["applied"][0]["step"]}],
        "remedies": [],
    }
    assert final_ack(plane, 2)["code"] == "old_epoch"
    assert final_ack(plane, 3)["state"] == "applied"
    assert "softly" in final_ack(plane, 3)["reason"]
    assert not grafts_at(again.model, "3")


def test_waiting_for_a_server_draws_nothing_that_is_the_trainings() -> None:
    before = random.getstate()
    back_off = BackOff(first=1.0, most=8.0)
    assert all(0.0 < back_off.next_delay() <= 8.0 for _ in range(5))
    assert random.getstate() == before


def test_a_server_that_has_lost_a_command_still_gets_everything_else(
    training: Training, plane: ControlPlane
) -> None:
    plane.answers_to["ack"] = (404, {"code": "not-found", "detail": "There is no such command"})
    with listening(training, plane) as session:
        plane.send(plane.command(CommandKind.PAUSE_ADAPTATION, 1))
        training.until(lambda: session._parts.server.paused, session)  # type: ignore[union-attr]
        stored = plane.stored_to
        training.until(lambda: plane.stored_to > stored + 20, session)
    assert plane.finishes
