"""A person asks for a trial in shadow: it is done in slices, and the run itself stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.contracts import Command, CommandKind
from esper.exceptions import ConfigurationError
from esper.sdk.shadow import ShadowTrial
from tests.esper.sdk.tiny_training import Training
from tests.esper.sdk.transport.attached import ended, final_ack, listening
from tests.esper.sdk.transport.control_plane import ControlPlane


def batches() -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(3)
    x = torch.randn(6, 32, 8, generator=draws)
    return [(one, one[:, :4].argmax(1)) for one in x]


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def held_out(model: nn.Module) -> float:
    return float(loss_of(model, batches()[0]))


def shadow(**changes: Any) -> esper.Shadow:
    how = {"batches": batches(), "loss": loss_of, "evaluate": held_out, "share": 1.0}
    return esper.Shadow(**{**how, **changes})


def ask(plane: ControlPlane, seq: int = 1, **changes: Any) -> Command:
    payload = {"blueprint": "proj_lora_64", "config": {}, "steps": 24, "seconds": 600.0}
    return plane.command(
        CommandKind.SHADOW, seq, adaptation="a1", layer="3", payload={**payload, **changes}
    )


def test_the_result_comes_as_the_answer_and_the_model_holds_nothing_new(
    training: Training, plane: ControlPlane
) -> None:
    with listening(training, plane, shadow=shadow()) as session:
        names = [name for name, _ in training.model.named_parameters()]
        plane.send(ask(plane))
        training.until(lambda: ended(plane, 1), session)
        ack = final_ack(plane, 1)
        assert ack["state"] == "applied", ack["reason"]
        told = ack["details"]
        assert (told["blueprint"], told["steps"]) == ("proj_lora_64", 24)
        assert told["low"] <= told["gain"] <= told["high"]
        assert session.adaptations == ()
        assert [name for name, _ in training.model.named_parameters()] == names


@pytest.mark.parametrize(
    ("how", "changes", "words"),
    [
        (None, {}, "attach(shadow=Shadow(...))"),
        ("given", {"blueprint": "no_such"}, "no_such"),
        ("given", {"steps": 0}, "above 0"),
    ],
    ids=["no shadow", "unknown blueprint", "no step"],
)
def test_what_cannot_be_tried_is_refused_with_its_reason(
    training: Training, plane: ControlPlane, how: str | None, changes: dict[str, Any], words: str
) -> None:
    with listening(training, plane, shadow=shadow() if how else None) as session:
        plane.send(ask(plane, **changes))
        training.until(lambda: ended(plane, 1), session)
        ack = final_ack(plane, 1)
        assert (ack["state"], ack["code"]) == ("refused", "does_not_fit")
        assert words in ack["reason"]


def test_an_error_of_the_scripts_own_loss_ends_the_trial_alone(
    training: Training, plane: ControlPlane
) -> None:
    def broken(model: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("no such column")

    with listening(training, plane, shadow=shadow(loss=broken)) as session:
        plane.send(ask(plane))
        training.until(lambda: ended(plane, 1), session)
        assert "no such column" in final_ack(plane, 1)["reason"]
        training.run(3, session)


def test_a_trial_that_the_run_does_not_live_to_see_is_answered(
    training: Training, plane: ControlPlane
) -> None:
    session = listening(training, plane, shadow=shadow(share=1e-9))
    plane.send(ask(plane))
    training.until(lambda: session._parts.shadow.busy, session)  # type: ignore[union-attr]
    session.close()
    assert ended(plane, 1)
    assert "ended before the trial" in final_ack(plane, 1)["reason"]


def test_the_run_is_the_same_to_the_bit_and_the_trial_keeps_its_share() -> None:
    plain = Training()
    with esper.attach(
        plain.model, plain.optimizer, server="", verbose=False, sampling=5
    ) as session:
        alone = plain.run(60, session)
    found: list[Any] = []
    tried = Training()
    with esper.attach(
        tried.model, tried.optimizer, server="", verbose=False, sampling=5, shadow=shadow()
    ) as session:
        losses = tried.run(20, session)
        trials = session._parts.shadow
        assert trials is not None
        now = [0.0]
        trials._clock = lambda: now[0]
        trial = ShadowTrial("3", "proj_lora_64", steps=12)
        trials.begin(trial, lambda twin, reason: found.append(twin or reason))
        with pytest.raises(ConfigurationError, match="another graft"):
            trials.begin(trial, lambda twin, reason: None)
        losses += tried.run(20, session)
        assert trials.busy  # the clock stands still, so no time is its share
        now[0] = 1e6
        losses += tried.run(20, session)
    assert losses == alone
    for one, other in zip(plain.model.parameters(), tried.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert found[0].steps == 12


def test_two_copies_must_fit_into_the_memory_for_snapshots() -> None:
    host = Training()
    with esper.attach(
        host.model, host.optimizer, server="", verbose=False, shadow=shadow(),
        snapshot_memory=1e-7,
    ) as session:  # fmt: skip
        host.run(2, session)
        trials = session._parts.shadow
        assert trials is not None
        with pytest.raises(ConfigurationError, match="two copies of the run"):
            trials.begin(ShadowTrial("3", "proj_lora_64"), lambda twin, reason: None)


@pytest.mark.parametrize(
    ("factors", "state"), [({"rank": 2.0}, "applied"), ({"rank": 3.0}, "refused")]
)
def test_a_variant_is_tried_at_a_factor_of_the_usual_size(
    training: Training, plane: ControlPlane, factors: dict[str, float], state: str
) -> None:
    with listening(training, plane, shadow=shadow()) as session:
        tried: list[int] = []
        trials = session._parts.shadow
        assert trials is not None
        copied = trials._surgery.graft_copy

        def seen(*place: Any) -> Any:
            receipt = copied(*place)
            tried.append(receipt.graft.down.shape[0])
            return receipt

        trials._surgery.graft_copy = seen  # type: ignore[method-assign]
        plane.send(ask(plane, factors=factors))
        training.until(lambda: ended(plane, 1), session)
        assert final_ack(plane, 1)["state"] == state
        # The usual rank is a quarter of the 16 channels.
        assert tried == ([8] if state == "applied" else [])
