"""The server asks what the model holds: the answer covers every earlier command."""

from __future__ import annotations

import pytest

from esper.contracts import Command, CommandKind
from esper.sdk.command_handler import CommandHandler
from tests.esper.sdk.tiny_training import Training
from tests.esper.sdk.transport.attached import (
    ended,
    final_ack,
    graft_command,
    kernel_for,
    listening,
)
from tests.esper.sdk.transport.control_plane import ControlPlane, wait_for


def ask(plane: ControlPlane, seq: int, adaptation: str) -> None:
    plane.send(plane.command(CommandKind.REPORT_HELD, seq, adaptation=adaptation))


def test_it_says_what_is_in_the_model_and_what_is_out_of_it(
    training: Training, plane: ControlPlane
) -> None:
    with listening(training, plane) as session:
        ask(plane, 1, "a1")
        plane.send(graft_command(plane, 2, kernel_for(session, plane), adaptation="a1"))
        ask(plane, 3, "a1")
        plane.send(plane.command(CommandKind.UNDO, 4, adaptation="a1", payload={"hard": True}))
        ask(plane, 5, "a1")
        payload = {"remedy": "weight_decay", "config": {}, "finding": ""}
        plane.send(plane.command(CommandKind.REMEDY, 6, adaptation="a6", payload=payload))
        ask(plane, 7, "a6")
        training.until(lambda: ended(plane, 7), session)
    codes = [
        (final_ack(plane, seq)["state"], final_ack(plane, seq)["code"]) for seq in (1, 3, 5, 7)
    ]
    held, gone = ("applied", ""), ("refused", "not_grafted")
    assert codes == [gone, held, gone, held]
    assert final_ack(plane, 3)["details"] == {"since_step": final_ack(plane, 2)["step"]}
    assert final_ack(plane, 3)["certificate"]["passed"]


def test_it_overtakes_no_command_that_waits(
    training: Training, plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = [True]

    def waits_for_inputs(self: CommandHandler, command: Command) -> bool:
        return command.kind is CommandKind.REMEDY and waits[0]

    monkeypatch.setattr(CommandHandler, "_waits_for_inputs", waits_for_inputs)
    with listening(training, plane) as session:
        payload = {"remedy": "weight_decay", "config": {}, "finding": ""}
        plane.send(plane.command(CommandKind.REMEDY, 1, adaptation="a1", payload=payload))
        plane.send(plane.command(CommandKind.KEEP, 2, adaptation="other"))
        ask(plane, 3, "a1")
        wait_for(lambda: plane.acks_of(3), "the question is accepted")
        training.until(lambda: ended(plane, 2), session)
        assert not ended(plane, 3)
        waits[0] = False
        training.until(lambda: ended(plane, 3), session)
        assert final_ack(plane, 3)["state"] == "applied"
