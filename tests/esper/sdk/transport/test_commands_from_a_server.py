"""Commands are applied at step boundaries, and a forged one is never applied."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.connection import Connection

from esper.compilation import build_kernel
from esper.contracts import (
    AdaptationState,
    CommandKind,
    LayerInfo,
    signing,
)
from esper.grafting import digest, span_of
from esper.grafting.tensors.random_streams import RandomStreams
from esper.sdk import RunStopped
from esper.sdk.transport import TransportQueues
from tests.esper.sdk.tiny_training import Training, slot_at
from tests.esper.sdk.transport.attached import (
    ended,
    final_ack,
    graft_command,
    kernel_for,
    listening,
)
from tests.esper.sdk.transport.control_plane import ControlPlane, wait_for


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


def test_a_command_for_a_span_reads_the_earlier_layers_input(
    training: Training, plane: ControlPlane
) -> None:
    with listening(training, plane) as session:
        layers = {layer.name: layer for layer in session.layers}
        place = span_of(layers, "3", "5", "widen_hidden")
        kernel = plane.add_kernel(
            build_kernel(place, "widen_hidden", {"hidden": 3}, private_key=plane.kernel_key)
        )
        command = graft_command(plane, 1, kernel, layer="5", payload={"since": "3"})
        plane.send(command)
        training.until(lambda: ended(plane, 1), session)
        ack = final_ack(plane, 1)
        assert ack["state"] == "applied", ack["reason"]
        assert ack["certificate"]["passed"]
        assert session.adaptations[0].since == "3"
        assert training.model.get_parameter("5.esper.widen_hidden.weight_in").shape == (3, 16)


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


@pytest.mark.parametrize("hard", [True, False])
def test_the_answer_to_an_undo_says_whether_the_weights_are_those_before_the_graft(
    training: Training, plane: ControlPlane, hard: bool
) -> None:
    """The server drops the losses in between from what it judges by."""
    with listening(training, plane) as session:
        plane.send(graft_command(plane, 1, kernel_for(session, plane)))
        training.until(lambda: ended(plane, 1), session)
        training.run(3, session)
        plane.send(plane.command(CommandKind.UNDO, 2, adaptation="a1", payload={"hard": hard}))
        training.until(lambda: ended(plane, 2), session)
        ack = final_ack(plane, 2)
    told = {"back_to_step": final_ack(plane, 1)["step"]} if hard else {}
    assert ack.get("details", {}) == told
    assert ack["step"] > final_ack(plane, 1)["step"]


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


def test_a_graft_that_expired_before_its_step_boundary_is_not_applied(
    training: Training, plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(training, plane) as session:
        plane.send(graft_command(plane, 1, kernel_for(session, plane)))
        server = session._parts.server
        assert server is not None
        wait_for(lambda: server.has_commands, "it was verified, and waits for a step boundary")
        monkeypatch.setattr(TransportQueues, "now", lambda _: time.time() + 3600)
        training.run(1, session)
        wait_for(lambda: ended(plane, 1), "it is answered")
        assert (final_ack(plane, 1)["state"], final_ack(plane, 1)["code"]) == ("failed", "expired")
        assert session.adaptations == ()
        monkeypatch.undo()


@pytest.mark.parametrize("seconds", [20.0, 3600.0])
@pytest.mark.parametrize("error", [-3600.0, 0.0, 3600.0])
def test_a_registration_that_was_answered_late_lets_no_expired_command_in(
    training: Training, plane: ControlPlane, seconds: float, error: float
) -> None:
    """Its answer was lost, and is given again with the time of the first attempt."""
    plane.clock = lambda: time.time() + error
    plane.registered_seconds_ago = seconds
    with listening(training, plane) as session:
        server = session._parts.server
        assert server is not None
        wait_for(lambda: plane.hellos, "it has said hello")
        kernel = kernel_for(session, plane)
        plane.send(graft_command(plane, 1, kernel, expires_at=plane.clock() - 1.0))
        training.until(lambda: ended(plane, 1), session)
        assert final_ack(plane, 1)["code"] == "expired"
        plane.send(graft_command(plane, 2, kernel, expires_at=plane.clock() + 600.0))
        training.until(lambda: ended(plane, 2), session)
        assert final_ack(plane, 2)["state"] == "applied"


def test_an_older_server_tells_its_time_at_the_registration_only(
    training: Training, plane: ControlPlane
) -> None:
    plane.clock = lambda: time.time() + 3600.0
    plane.hello_has_time = False
    with listening(training, plane) as session:
        command = graft_command(plane, 1, kernel_for(session, plane), expires_at=time.time() + 60.0)
        plane.send(command)
        training.until(lambda: ended(plane, 1), session)
        assert final_ack(plane, 1)["code"] == "expired"


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
    wait_for(lambda: session._parts.queues and session._parts.queues.inbox, "it is prepared")
    session.close()
    assert final_ack(plane, 1)["state"] == "failed"


def test_the_command_stream_draws_nothing_from_the_random_streams_of_the_script(
    training: Training, plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's keepalive would, in the transport thread, every 20 seconds; here at once."""

    async def ping_at_once(connection: Connection) -> None:
        await connection.ping()

    monkeypatch.setattr(Connection, "keepalive", ping_at_once)
    before = RandomStreams.read()
    with listening(training, plane) as session:
        plane.send(graft_command(plane, 1, kernel_for(session, plane)))
        training.until(lambda: ended(plane, 1), session)
    after = RandomStreams.read()
    assert after.python == before.python
    assert after.equals(replace(before, torch=after.torch))  # the training draws from torch's
