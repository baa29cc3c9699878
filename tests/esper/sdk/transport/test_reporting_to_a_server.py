"""A run registers, and everything that it measures reaches the server once."""

from __future__ import annotations

import gc
import math
import time
import weakref
from dataclasses import replace

import pytest

import esper
from esper.contracts import (
    SafetyPolicy,
    telemetry_body,
)
from tests.esper.sdk.tiny_training import Training
from tests.esper.sdk.transport.attached import (
    attached,
    ended,
    graft_command,
    kernel_for,
    listening,
)
from tests.esper.sdk.transport.control_plane import ControlPlane, wait_for


def test_a_run_registers_says_hello_and_finishes(training: Training, plane: ControlPlane) -> None:
    with attached(training, plane, target_steps=50) as session:
        training.run(5, session)
        wait_for(lambda: plane.hellos, "hello is said")
        assert session.run == plane.uid
    (registration,) = plane.registrations
    assert registration["name"] == "tiny"
    assert registration["mode"] == "automatic"
    assert registration["target_steps"] == 50
    assert [layer["name"] for layer in registration["layers"]] == ["0", "3", "5"]
    assert registration["model_parameters"] == 8 * 16 + 16 + 16 * 16 + 16 + 16 * 4 + 4
    nothing = {"applied": [], "remedies": [], "last_command_seq": 0}
    assert plane.hellos == [{"epoch": 1, "step": 1, **nothing}]
    assert plane.finishes == [{"epoch": 1, "state": "finished", "step": 5, "reason": ""}]


def test_telemetry_arrives_once_although_replies_are_lost(
    training: Training, plane: ControlPlane
) -> None:
    with attached(training, plane) as session:
        for _ in range(6):
            plane.lose_replies += 1
            training.run(10, session)
            session.report(accuracy=0.5)
            time.sleep(0.03)
        plane.lose_replies = 0
    steps = [entry["step"] for entry in plane.metrics]
    assert steps == list(range(1, 61))
    assert plane.duplicates > 0
    assert session.telemetry["offered"] == session.telemetry["stored"]
    assert plane.frames
    assert any("accuracy" in entry["values"] for entry in plane.metrics)


@pytest.mark.parametrize("types", [[], [telemetry_body.MEDIA_TYPE]])
def test_frames_go_as_bytes_to_a_server_that_takes_them_and_as_json_to_an_older_one(
    training: Training, plane: ControlPlane, types: list[str]
) -> None:
    plane.telemetry_types = types
    with attached(training, plane) as session:
        training.run(20, session)
        wait_for(lambda: plane.frames, "a frame is sent")
    assert plane.media_types == {"application/json", *types}
    assert session.telemetry["offered"] == session.telemetry["stored"]


def test_a_failed_run_says_why(training: Training, plane: ControlPlane) -> None:
    def run() -> None:
        with listening(training, plane):
            raise ZeroDivisionError("division by zero")

    with pytest.raises(ZeroDivisionError):
        run()
    assert plane.finishes[0]["state"] == "failed"
    assert plane.finishes[0]["reason"] == "division by zero"


def test_a_session_that_the_script_forgets_stays_until_the_run_has_ended(
    training: Training, plane: ControlPlane
) -> None:
    forgotten = weakref.ref(listening(training, plane))
    gc.collect()
    session = forgotten()
    assert session is not None  # for its end is reported when Python exits
    session.close()
    del session
    gc.collect()
    assert forgotten() is None
    assert plane.finishes


def test_a_diverged_loss_reaches_the_server(training: Training, plane: ControlPlane) -> None:
    with attached(training, plane) as session:
        training.run(3, session)
        session.step(math.nan)
        training.run(1, session)
    values = [entry["values"]["loss"] for entry in plane.metrics]
    assert values[3] == "nan"
    opened, over = plane.findings
    assert [opened["rule"], over["rule"]] == ["non_finite", "non_finite"]
    assert (opened["resolved_step"], over["resolved_step"]) == (-1, 5)


def test_what_the_server_will_never_take_is_counted(
    training: Training, plane: ControlPlane
) -> None:
    with attached(training, plane) as session:
        training.run(2, session)
        wait_for(lambda: plane.metrics, "the first batch is stored")
        plane.answers_to["telemetry"] = (422, {"code": "invalid", "detail": "no"})
        training.run(10, session)
        wait_for(lambda: session.telemetry["dropped"], "a batch is refused")
        wait_for(lambda: not session.telemetry["waiting"], "all was tried")
        del plane.answers_to["telemetry"]
        training.run(2, session)
    counts = session.telemetry
    assert counts["offered"] == counts["stored"] + counts["dropped"]
    assert sum(batch["dropped"] for batch in plane.batches) == counts["dropped"]


def test_a_wrong_token_is_reported_once_and_training_goes_on(
    training: Training, plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    session = esper.attach(
        training.model, training.optimizer, server=plane.url, token="wrong", run="tiny"
    )
    with session:
        training.run(5, session)
        wait_for(lambda: "ESPER_TOKEN" in caplog.text, "the reason is logged")
        training.run(5, session)
    assert caplog.text.count("no longer reports this run") == 1
    assert plane.registrations == []


def test_a_run_that_another_process_attached_reports_nothing_more(
    training: Training, plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    with listening(training, plane) as session:
        plane.epochs[plane.uid] += 1  # another process attached the same name
        training.run(20, session)
        wait_for(lambda: "replaced this one" in caplog.text, "it notices")
        training.run(5, session)
    assert plane.finishes == []


def test_evaluation_reports_the_gain_of_each_graft(training: Training, plane: ControlPlane) -> None:
    plane.policy = replace(SafetyPolicy(), maturity_steps=5, probation_steps=13, probation_looks=2)
    with listening(training, plane, evaluate=training.evaluate) as session:
        plane.send(graft_command(plane, 1, kernel_for(session, plane)))
        training.until(lambda: ended(plane, 1), session)
        training.run(14, session)
    looks = {"ablation_gain:a1", "ablation_loss:a1"}
    measured = [entry for entry in plane.metrics if looks <= set(entry["values"])]
    start = session.adaptations[0].step
    assert [entry["step"] for entry in measured] == [start + 9, start + 13]
