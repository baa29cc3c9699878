"""EMA and SWA copies follow the model through a graft and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import esper
from esper import blueprints
from esper.exceptions import ConfigurationError
from esper.grafting import digest, let_follow
from tests.esper.tiny_models import IN_LAYERS, Training, make_training

LAYER = "blocks.0.wide"


def averaged(model: nn.Module, *, use_buffers: bool = False) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)


def run(training: Training, session: Any, average: AveragedModel, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        losses.append(training.step())
        session.step(losses[-1])
        average.update_parameters(training.model)
    return losses


@pytest.mark.parametrize("use_buffers", [False, True])
# kv_cache_8bit sits on a decoder of transformers, and averages nothing of its own.
@pytest.mark.parametrize("slug", [slug for slug in IN_LAYERS if slug != "kv_cache_8bit"])
def test_an_average_gets_a_graft_and_averages_it(slug: str, use_buffers: bool) -> None:
    training = make_training("none")
    average = averaged(training.model, use_buffers=use_buffers)
    session = esper.attach(training.model, training.optimizer, copies=average)
    run(training, session, average, 3)
    layer = "blocks.0.norm" if slug == "ln_rms" else LAYER
    for needed in sorted(blueprints.get_blueprint(slug).requires)[-1:]:
        session.graft(layer, needed)
    receipt = session.graft(layer, slug)
    run(training, session, average, 3)
    names = [name for name, _ in training.model.named_parameters()]
    assert [name for name, _ in average.module.named_parameters()] == names
    mine = dict(average.module.named_parameters())
    for name, parameter in receipt.graft.named_parameters(prefix=f"{layer}.esper.{slug}"):
        assert mine[name] is not parameter
        assert not torch.equal(mine[name], parameter)
        assert torch.allclose(mine[name], parameter, atol=0.05)
    session.close()


@pytest.mark.parametrize("made_before_attach", [True, False])
def test_a_hard_undo_brings_the_average_back_too(made_before_attach: bool) -> None:
    def start() -> tuple[Training, Any, AveragedModel]:
        training = make_training("none")
        average = averaged(training.model) if made_before_attach else None
        if average is None:
            esper.attach(training.model, training.optimizer).close()
            average = averaged(training.model)
        session = esper.attach(training.model, training.optimizer, copies=average)
        run(training, session, average, 3)
        return training, session, average

    plain, plain_session, plain_average = start()
    expected = run(plain, plain_session, plain_average, 6)
    training, session, average = start()
    receipt = session.graft(LAYER, "mlp_gelu_2048")
    run(training, session, average, 4)
    training.steps -= 4
    session.undo(receipt)
    assert run(training, session, average, 6) == expected
    assert digest(average) == digest(plain_average)
    for opened in (session, plain_session):
        opened.close()


def test_a_soft_undo_and_a_failed_graft_leave_no_graft_in_the_average(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = make_training("none")
    average = averaged(training.model)
    names = [name for name, _ in average.named_parameters()]
    session = esper.attach(training.model, training.optimizer, copies=[average])
    run(training, session, average, 2)
    receipt = session.graft(LAYER, "proj_lora_64")
    session.undo(receipt, hard=False)
    assert [name for name, _ in average.named_parameters()] == names
    run(training, session, average, 2)

    def fail(**_: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr("esper.grafting.changes.apply.Receipt", fail)
    with pytest.raises(RuntimeError, match="no room"):
        session.graft(LAYER, "proj_ia3")
    assert [name for name, _ in average.named_parameters()] == names
    session.close()


def test_an_undeclared_copy_is_a_finding_once_it_lacks_a_graft() -> None:
    """One that no one has averaged into yet: an average gets the graft without being named."""
    training = make_training("none")
    session = esper.attach(training.model, training.optimizer, mode="supervised")
    run(training, session, averaged(training.model), 1)
    # A layer without a graft has no slot, so a copy is not known before its layer has one.
    session.graft(LAYER, "proj_lora_64")
    kept = copy.deepcopy(training.model)
    copy.deepcopy(training.model)  # gone at once
    run(training, session, averaged(training.model), 2)
    assert session.findings() == []
    receipt = session.graft(LAYER, "proj_ia3")
    (finding,) = [f for f in session.findings() if f.layer == LAYER]
    assert (finding.layer, finding.severity) == (LAYER, "caution")
    assert "copies=" in finding.remedy
    let_follow(training.model, [kept])
    session.step(1.0)
    session.undo(receipt, hard=False)
    let_follow(training.model, [kept])
    session.step(1.0)
    assert [f for f in session.findings() if f.layer == LAYER] == []
    session.close()


def test_a_copy_of_another_model_is_refused_at_attach() -> None:
    training = make_training("none")
    with pytest.raises(ConfigurationError, match="differs from the model"):
        esper.attach(training.model, training.optimizer, copies=averaged(nn.Linear(2, 2)))
