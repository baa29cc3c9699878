"""A session and its control plane, over real sockets.

No report is lost, no forged command is applied, and training goes on while the server is down.
"""

from __future__ import annotations

import gc
import math
import random
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import esper
from esper.compilation import build_kernel
from esper.contracts import (
    AdaptationState,
    CommandKind,
    LayerInfo,
    SafetyPolicy,
    signing,
)
from esper.grafting import digest
from esper.sdk import RunStopped
from esper.sdk.transport.client import BackOff
from esper.sdk.transport.journal import JOURNAL_FILE
from tests.esper.sdk.tiny_training import Training, slot_at
from tests.esper.sdk.transport.control_plane import ControlPlane, wait_for


def attached(training: Training, plane: ControlPlane, **options: Any) -> esper.Session:
    given = {"mode": "automatic", "run": "tiny", **options}
    return esper.attach(
        training.model,
        training.optimizer,
        scheduler=training.scheduler,
        server=plane.url,
        token="esp_attach",
        **given,
    )


def listening(training: Training, plane: ControlPlane, **options: Any) -> esper.Session:
    """Attached, registered, and on the command stream."""
    session = attached(training, plane, **options)
    training.run(1, session)
    wait_for(lambda: plane.listeners, "the trainer listens")
    return session


def kernel_for(session: esper.Session, plane: ControlPlane, layer: str = "3") -> str:
    return plane.add_kernel(
        build_kernel(_layer(session, layer), "proj_lora_64", private_key=plane.kernel_key)
    )


def _layer(session: esper.Session, name: str) -> LayerInfo:
    return next(layer for layer in session.layers if layer.name == name)


def graft_command(plane: ControlPlane, seq: int, kernel: str, **fields: Any) -> Any:
    given = {"adaptation": f"a{seq}", "layer": "3", "kernel_digest": kernel, **fields}
    return plane.command(CommandKind.GRAFT, seq, **given)


def final_ack(plane: ControlPlane, seq: int) -> dict[str, Any]:
    acks = [ack for ack in plane.acks_of(seq) if ack["state"] != "accepted"]
    assert len(acks) == 1
    return acks[0]


def ended(plane: ControlPlane, seq: int) -> bool:
    return any(ack["state"] != "accepted" for ack in plane.acks_of(seq))


# -- registration and telemetry ----------------------------------------------------------------


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
    assert plane.hellos == [{"epoch": 1, "step": 1, "applied": []}]
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
    assert [finding["rule"] for finding in plane.findings] == ["non_finite"]


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


# -- commands ----------------------------------------------------------------------------------


def test_a_graft_command_is_applied_at_a_step_boundary_and_acknowledged(
    training: Training, plane: ControlPlane
) -> None:
    with listening(training, plane) as session:
        before = digest(training.model)
        kernel = kernel_for(session, plane)
        plane.send(graft_command(plane, 1, kernel))
        wait_for(lambda: plane.acks_of(1), "the command is accepted")
        assert digest(training.model) == before  # not before a boundary
        training.until(lambda: ended(plane, 1), session)
        ack = final_ack(plane, 1)
        assert [entry["state"] for entry in plane.acks_of(1)] == ["accepted", "applied"]
        assert ack["certificate"]["passed"]
        assert ack["certificate"]["max_abs_diff"] == 0.0
        assert ack["pause_ms"] > 0
        assert ack["digest_before"] != ack["digest_after"]
        assert ack["step"] == session.adaptations[0].step
        assert list(slot_at(training.model, "3").grafts()) == ["proj_lora_64"]
        assert session.adaptations[0].uid == "a1"


def test_a_staged_kernel_is_used_without_a_download(
    training: Training, plane: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPER_STAGE_DIR", str(tmp_path / "stage"))
    with listening(training, plane) as session:
        kernel = kernel_for(session, plane)
        folder = tmp_path / "stage" / kernel
        folder.mkdir(parents=True)
        for name, data in plane.kernels.pop(kernel).items():
            (folder / name).write_bytes(data)
        plane.send(graft_command(plane, 1, kernel))
        training.until(lambda: ended(plane, 1), session)
        assert final_ack(plane, 1)["state"] == "applied"


def test_an_undo_command_brings_the_model_back_to_the_bit(
    training: Training, plane: ControlPlane
) -> None:
    with listening(training, plane) as session:
        plane.send(graft_command(plane, 1, kernel_for(session, plane)))
        training.until(lambda: ended(plane, 1), session)
        training.run(5, session)
        undo = plane.command(
            CommandKind.UNDO, 2, adaptation="a1", payload={"hard": True, "reason": "harmful"}
        )
        plane.send(undo)
        wait_for(lambda: plane.acks_of(2), "the undo is accepted")
        training.until(lambda: ended(plane, 2), session)
        assert final_ack(plane, 2)["state"] == "applied"
        assert final_ack(plane, 2)["digest_after"] == final_ack(plane, 1)["digest_before"]
        assert session.adaptations[0].state is AdaptationState.ROLLED_BACK


def test_what_is_not_grafted_cannot_be_undone(training: Training, plane: ControlPlane) -> None:
    with listening(training, plane) as session:
        plane.send(plane.command(CommandKind.UNDO, 1, adaptation="nobody"))
        training.until(lambda: ended(plane, 1), session)
        assert final_ack(plane, 1)["code"] == "not_grafted"


def _forged(plane: ControlPlane, kernel: str) -> str:
    plane.send(graft_command(plane, 1, kernel), key=signing.generate_private_key())
    return "bad_signature"


def _foreign(plane: ControlPlane, kernel: str) -> str:
    plane.send(graft_command(plane, 1, kernel, run="another-run"))
    return "foreign_run"


def _of_an_old_epoch(plane: ControlPlane, kernel: str) -> str:
    plane.send(graft_command(plane, 1, kernel, epoch=plane.epoch - 1))
    return "old_epoch"


def _expired(plane: ControlPlane, kernel: str) -> str:
    plane.send(graft_command(plane, 1, kernel, expires_at=time.time() - 1))
    return "expired"


def _for_a_kernel_that_was_altered(plane: ControlPlane, kernel: str) -> str:
    files = plane.kernels[kernel]
    plane.kernels[kernel] = {**files, "recipe.json": files["recipe.json"] + b" "}
    plane.send(graft_command(plane, 1, kernel))
    return "bad_digest"


def _for_a_kernel_that_does_not_exist(plane: ControlPlane, kernel: str) -> str:
    plane.send(graft_command(plane, 1, "0" * 64))
    return "bad_digest"


def _for_a_path_instead_of_a_kernel(plane: ControlPlane, kernel: str) -> str:
    plane.send(graft_command(plane, 1, "../../etc"))
    return "bad_digest"


def _with_a_kernel_of_an_unknown_key(plane: ControlPlane, kernel: str) -> str:
    layer = LayerInfo.from_wire(plane.registrations[0]["layers"][1])
    bundle = build_kernel(layer, "proj_lora_64", private_key=signing.generate_private_key())
    plane.send(graft_command(plane, 1, plane.add_kernel(bundle)))
    return "bad_signature"


def _at_a_layer_of_another_shape(plane: ControlPlane, kernel: str) -> str:
    plane.send(graft_command(plane, 1, kernel, layer="nowhere"))
    return "incompatible_layer"


def _without_a_kind(plane: ControlPlane, kernel: str) -> str:
    command = graft_command(plane, 1, kernel)
    signature = signing.sign(command.signing_bytes(), plane.command_key)
    broken = {**command.to_wire(), "kind": "dance"}
    plane.push({"type": "command", "command": broken, "signature": signature})
    return "malformed"


@pytest.mark.parametrize(
    "send",
    [
        _forged,
        _foreign,
        _of_an_old_epoch,
        _expired,
        _for_a_kernel_that_was_altered,
        _for_a_kernel_that_does_not_exist,
        _for_a_path_instead_of_a_kernel,
        _with_a_kernel_of_an_unknown_key,
        _at_a_layer_of_another_shape,
        _without_a_kind,
    ],
)
def test_a_bad_command_is_refused_with_its_code_and_the_model_is_untouched(
    training: Training, plane: ControlPlane, send: Any
) -> None:
    with listening(training, plane) as session:
        kernel = kernel_for(session, plane)
        before = digest(training.model)
        code = send(plane, kernel)
        wait_for(lambda: ended(plane, 1), "the refusal arrives")
        assert final_ack(plane, 1)["state"] == "refused"
        assert final_ack(plane, 1)["code"] == code
        assert digest(training.model) == before
        training.run(2, session)
        assert session.adaptations == ()


def test_a_replayed_command_is_refused_and_applied_once(
    training: Training, plane: ControlPlane
) -> None:
    with listening(training, plane) as session:
        command = graft_command(plane, 1, kernel_for(session, plane))
        plane.send(command)
        training.until(lambda: ended(plane, 1), session)
        plane.send(command)
        training.until(lambda: len(plane.acks_of(1)) == 3, session)
        assert [(ack["state"], ack["code"]) for ack in plane.acks_of(1)] == [
            ("accepted", ""),
            ("applied", ""),
            ("refused", "replayed"),
        ]
        assert len(session.adaptations) == 1


def test_a_command_that_is_delivered_twice_is_done_once(
    training: Training, plane: ControlPlane
) -> None:
    with listening(training, plane) as session:
        command = graft_command(plane, 1, kernel_for(session, plane))
        plane.send(command)
        plane.send(command)
        wait_for(lambda: plane.acks_of(1), "it is accepted")
        time.sleep(0.1)
        training.until(lambda: ended(plane, 1), session)
        assert [ack["state"] for ack in plane.acks_of(1)] == ["accepted", "applied"]


def test_a_command_that_was_lost_on_the_way_is_caught_up_in_order(
    training: Training, plane: ControlPlane
) -> None:
    with listening(training, plane) as session:
        first = plane.command(CommandKind.PAUSE_ADAPTATION, 1)
        entry = {
            "command": first.to_wire(),
            "signature": signing.sign(first.signing_bytes(), plane.command_key),
        }
        plane.log.append(entry)  # it never came over the stream
        plane.send(plane.command(CommandKind.RESUME_ADAPTATION, 2))
        training.until(lambda: ended(plane, 2), session)
        assert [ack["seq"] for ack in plane.acks if ack["state"] == "applied"] == [1, 2]


def test_an_observing_trainer_refuses_to_be_changed(
    training: Training, plane: ControlPlane
) -> None:
    with listening(training, plane, mode="observe") as session:
        before = digest(training.model)
        plane.send(graft_command(plane, 1, kernel_for(session, plane)))
        wait_for(lambda: ended(plane, 1), "the refusal arrives")
        assert final_ack(plane, 1)["code"] == "mode_forbids"
        assert digest(training.model) == before


def test_paused_adaptation_refuses_grafts_until_it_is_resumed(
    training: Training, plane: ControlPlane
) -> None:
    with listening(training, plane) as session:
        kernel = kernel_for(session, plane)
        plane.send(plane.command(CommandKind.PAUSE_ADAPTATION, 1, payload={"reason": "tea"}))
        training.until(lambda: ended(plane, 1), session)
        plane.send(graft_command(plane, 2, kernel))
        training.until(lambda: ended(plane, 2), session)
        plane.send(plane.command(CommandKind.RESUME_ADAPTATION, 3))
        training.until(lambda: ended(plane, 3), session)
        plane.send(graft_command(plane, 4, kernel))
        training.until(lambda: ended(plane, 4), session)
        assert final_ack(plane, 2)["code"] == "paused"
        assert final_ack(plane, 4)["state"] == "applied"


def test_a_stopped_run_raises_at_the_next_step(training: Training, plane: ControlPlane) -> None:
    session = listening(training, plane)
    plane.send(plane.command(CommandKind.STOP_RUN, 1, payload={"reason": "enough"}))
    wait_for(lambda: plane.acks_of(1), "it is accepted")
    with pytest.raises(RunStopped, match="enough"), session:
        training.until(lambda: False, session)
    assert final_ack(plane, 1)["state"] == "applied"
    assert plane.finishes[0]["state"] == "finished"
    assert plane.finishes[0]["reason"] == "enough"


def test_a_command_without_a_later_boundary_is_answered_at_the_end(
    training: Training, plane: ControlPlane
) -> None:
    session = listening(training, plane)
    plane.send(graft_command(plane, 1, kernel_for(session, plane)))
    wait_for(lambda: session._queues and session._queues.inbox, "it is prepared")
    session.close()
    assert final_ack(plane, 1)["state"] == "failed"


# -- servers that go away ----------------------------------------------------------------------


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
        wait_for(lambda: session._queues and session._queues.inbox, "it is prepared")
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
    wait_for(lambda: session._queues and session._queues.inbox, "it is prepared")
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
    assert report["digest_after"] == final_ack(plane, 1)["digest_before"]


# -- restarts ----------------------------------------------------------------------------------


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
    held = {"adaptation": "a1", "layer": "3", "blueprint": "proj_lora_64", "merged": False}
    assert plane.hellos[1] == {
        "epoch": 2,
        "step": state["step"] + 1,
        "applied": [{**held, "step": state["applied"][0]["step"]}],
    }
    assert final_ack(plane, 2)["code"] == "old_epoch"
    assert final_ack(plane, 3)["state"] == "applied"
    assert "softly" in final_ack(plane, 3)["reason"]
    assert not list(slot_at(again.model, "3").grafts())


def test_evaluation_reports_the_gain_of_each_graft(training: Training, plane: ControlPlane) -> None:
    plane.policy = replace(SafetyPolicy(), maturity_steps=5, probation_steps=10)
    with listening(training, plane, evaluate=training.evaluate) as session:
        plane.send(graft_command(plane, 1, kernel_for(session, plane)))
        training.until(lambda: ended(plane, 1), session)
        training.run(12, session)
    measured = [entry for entry in plane.metrics if "ablation_gain:a1" in entry["values"]]
    start = session.adaptations[0].step
    assert [entry["step"] for entry in measured] == [start + 5, start + 10]


def test_waiting_for_a_server_draws_nothing_that_is_the_trainings() -> None:
    before = random.getstate()
    back_off = BackOff(first=1.0, most=8.0)
    assert all(0.0 < back_off.next_delay() <= 8.0 for _ in range(5))
    assert random.getstate() == before
