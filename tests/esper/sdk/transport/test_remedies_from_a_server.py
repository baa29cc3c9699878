"""A sick run proposes remedies to its server, applies what that orders, and judges it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from esper.contracts import CommandKind
from esper.exceptions import ConfigurationError
from esper.sdk import proposing
from tests.esper.sdk.tiny_training import Training
from tests.esper.sdk.transport.attached import attached, ended, final_ack, listening
from tests.esper.sdk.transport.control_plane import ControlPlane, wait_for


def order(plane: ControlPlane, seq: int, remedy: str, **fields: Any) -> None:
    config, finding = fields.pop("config", {}), fields.pop("finding", "")
    payload = {"remedy": remedy, "config": config, "finding": finding}
    given = {"adaptation": f"a{seq}", "payload": payload, **fields}
    plane.send(plane.command(CommandKind.REMEDY, seq, **given))


def undo(plane: ControlPlane, seq: int, adaptation: str, *, hard: bool) -> None:
    payload = {"hard": hard, "reason": "a person"}
    plane.send(plane.command(CommandKind.UNDO, seq, adaptation=adaptation, payload=payload))


def test_a_sick_run_proposes_applies_and_judges(training: Training, plane: ControlPlane) -> None:
    with listening(training, plane, mode="supervised") as session:
        training.run(30, session)
        training.spoil = lambda loss: loss * math.nan
        training.until(lambda: plane.proposals, session)
        training.spoil = lambda loss: loss
        sent = plane.proposals[0]
        assert (sent["remedy"], sent["finding"]["slug"]) == ("rewind", "non_finite")
        assert session.proposed_remedies
        with pytest.raises(ConfigurationError, match="approved there"):
            session.approve(session.proposed_remedies[0])
        order(plane, 1, sent["remedy"], config=sent["config"], finding="non_finite")
        training.until(lambda: plane.verdicts, session)
        assert final_ack(plane, 1)["state"] == "applied"
        assert final_ack(plane, 1)["details"]["to_step"] <= 31
        assert session.proposed_remedies == ()
        verdict = plane.verdicts[0]
        assert (verdict["adaptation"], verdict["keep"]) == ("a1", True)
        assert verdict["reason"] == "“NaN or infinite values” is over"
        plane.send(plane.command(CommandKind.KEEP, 2, adaptation="a1"))
        training.until(lambda: ended(plane, 2), session)
        assert final_ack(plane, 2)["state"] == "applied"
    assert plane.remedies == []  # what the server ordered is not the script's


def test_a_remedy_that_does_not_help_waits_for_the_servers_order(
    training: Training, plane: ControlPlane
) -> None:
    with listening(training, plane) as session:
        training.run(20, session)
        training.spoil = lambda loss: loss * math.inf
        training.until(lambda: plane.proposals, session)
        order(plane, 1, "weight_decay", finding="non_finite")
        training.until(lambda: plane.verdicts, session)
        assert not plane.verdicts[0]["keep"]
        assert "still open" in plane.verdicts[0]["reason"]
        assert [receipt.adaptation for receipt in session.remedies] == ["a1"]
        undo(plane, 2, "a1", hard=False)
        training.until(lambda: ended(plane, 2), session)
        assert session.remedies == ()


def test_an_unanswered_proposal_does_not_silence_others(
    training: Training, plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposing, "ASK_AGAIN_SECONDS", 0.0)
    held = list(training.model.parameters())[:-2]  # a fault from the first step on
    training.optimizer = torch.optim.AdamW(held, lr=1e-2)
    training.scheduler = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda _: 1.0)
    with listening(training, plane, mode="supervised") as session:
        training.until(lambda: plane.proposals, session)
        training.spoil = lambda loss: loss * math.nan
        slugs: set[str] = set()

        def two_findings() -> bool:
            slugs.update(sent["finding"]["slug"] for sent in list(plane.proposals))
            return len(slugs) > 1

        training.until(two_findings, session)
        assert "non_finite" in slugs

        def asked_again() -> bool:
            keys = [sent["key"] for sent in list(plane.proposals)]
            return len(set(keys)) < len(keys)

        training.until(asked_again, session)


@pytest.mark.parametrize("remedy", ["set_lr", "rewind", "repair_scale"])
def test_a_person_takes_a_remedy_back_to_the_bit(
    training: Training, plane: ControlPlane, remedy: str
) -> None:
    with listening(training, plane) as session:
        training.run(20, session)
        order(plane, 1, remedy)
        training.until(lambda: ended(plane, 1), session)
        assert final_ack(plane, 1)["state"] == "applied", final_ack(plane, 1)
        training.run(3, session)
        undo(plane, 2, "a1", hard=True)
        training.until(lambda: ended(plane, 2), session)
        assert final_ack(plane, 2)["details"] == {"exact": True}
        assert final_ack(plane, 2)["digest_after"] == final_ack(plane, 1)["digest_before"]
        assert session.remedies == ()


@pytest.mark.parametrize("mode", ["observe", "supervised"])
def test_what_changes_nothing_is_done_in_every_mode_and_is_kept_at_once(
    training: Training, plane: ControlPlane, mode: str
) -> None:
    with listening(training, plane, mode=mode, evaluate=lambda: 0.25) as session:
        training.run(20, session)
        order(plane, 1, "evaluate_now")
        training.until(lambda: plane.verdicts, session)
        assert final_ack(plane, 1)["details"] == {"held_out_loss": 0.25}
        assert plane.verdicts[0]["keep"]
        assert session.remedies == ()
        plane.send(plane.command(CommandKind.KEEP, 2, adaptation="a1"))
        undo(plane, 3, "a1", hard=True)
        training.until(lambda: ended(plane, 3), session)
        assert [final_ack(plane, seq)["state"] for seq in (2, 3)] == ["applied", "applied"]


@pytest.mark.parametrize(
    ("mode", "remedy", "fields", "why"),
    [
        ("observe", "set_lr", {}, "attached to observe"),
        ("automatic", "prayer", {}, "no remedy 'prayer'"),
        ("automatic", "set_lr", {"config": {"factor": -1}}, "factor must be a number above 0"),
        ("automatic", "restore_best", {}, "no held-out loss has been measured"),
        ("automatic", "clip_layer", {"layer": "nose"}, "nose"),
    ],
)
def test_a_refusal_says_why(
    training: Training, plane: ControlPlane, mode: str, remedy: str, fields: Any, why: str
) -> None:
    with listening(training, plane, mode=mode) as session:
        order(plane, 1, remedy, **fields)
        training.until(lambda: ended(plane, 1), session)
        assert final_ack(plane, 1)["state"] == "refused"
        assert why in final_ack(plane, 1)["reason"]
        assert session.remedies == ()


def test_a_script_that_undoes_an_ordered_remedy_tells_of_it(
    training: Training, plane: ControlPlane
) -> None:
    with listening(training, plane) as session:
        order(plane, 1, "set_lr")
        training.until(lambda: ended(plane, 1), session)
        session.undo(session.remedies[0])
        wait_for(lambda: plane.remedies, "the undo is reported")
        report = plane.remedies[0]
        assert (report["remedy"], report["adaptation"], report["undoes"]) == ("undo", "a1", "")


def test_a_restarted_trainer_holds_and_judges_its_remedies(
    training: Training, plane: ControlPlane
) -> None:
    with listening(training, plane) as session:
        order(plane, 1, "set_lr")
        training.until(lambda: ended(plane, 1), session)
        step = session.remedies[0].step
        saved = session.state_dict()
        saved_model = training.model.state_dict()
    again = Training()
    plane.last_command_seq = 1
    plane.log.clear()
    with attached(again, plane) as session:
        session.load_state_dict(saved)
        again.model.load_state_dict(saved_model)
        again.until(lambda: len(plane.hellos) > 1, session)
        held = {
            **{"adaptation": "a1", "step": step, "remedy": "set_lr", "layer": ""},
            **{"config": {"factor": 0.5}, "finding": "", "kept": False},
        }
        assert plane.hellos[1]["remedies"] == [held]
        again.until(lambda: plane.verdicts, session)
        verdict = plane.verdicts[0]
        assert (verdict["adaptation"], verdict["keep"]) == ("a1", True)


def test_an_older_server_is_asked_once(training: Training, plane: ControlPlane) -> None:
    plane.answers_to["remedy-proposals"] = (404, {"code": "not-found", "detail": "no such address"})
    with listening(training, plane) as session:
        training.run(20, session)
        training.spoil = lambda loss: loss * math.nan
        training.until(lambda: plane.findings, session)
        training.run(5, session)
        training.spoil = lambda loss: loss
        before = len(plane.metrics)
        training.until(lambda: len(plane.metrics) > before + 20, session)  # it still reports
