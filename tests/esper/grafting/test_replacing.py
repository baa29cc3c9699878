"""A LayerNorm turns into an RMSNorm by schedule: exact at both ends, and undone like any graft."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper import blueprints
from esper.blueprints import Graft
from esper.contracts import LayerInfo
from esper.exceptions import CertificateError, IncompatibleLayerError
from esper.grafting import Receipt, apply_graft, rebuild, structure, trace_layers
from tests.esper.tiny_models import Training, make_training

WIDTH = 16


def trained_norm() -> tuple[nn.Sequential, Tensor]:
    """A model around one LayerNorm whose gain and bias have moved away from one and zero."""
    generator = torch.Generator().manual_seed(1)
    norm = nn.LayerNorm(WIDTH)
    with torch.no_grad():
        norm.weight.add_(torch.randn(WIDTH, generator=generator) * 0.3)
        norm.bias.add_(torch.randn(WIDTH, generator=generator))
    return nn.Sequential(norm), torch.randn(3, 5, WIDTH, generator=generator) + 0.5


def describe(model: nn.Module, x: Tensor) -> LayerInfo:
    return trace_layers(model, lambda: model(x))[0]


def replaced(model: nn.Module, x: Tensor, **config: float) -> Receipt:
    return apply_graft(
        model, describe(model, x), blueprints.get_blueprint("ln_rms"), config=config, x=x
    )


def norm_of(model: nn.Sequential) -> nn.LayerNorm:
    norm = model[0]
    assert isinstance(norm, nn.LayerNorm)
    return norm


def gain_of(graft: Graft) -> nn.Parameter:
    return graft.get_parameter("gain")


def alpha_of(graft: Graft) -> float:
    assert graft.alpha is not None
    return float(graft.alpha)


def test_it_starts_as_the_layer_norm_and_ends_as_an_rms_norm_with_the_same_gain() -> None:
    model, x = trained_norm()
    host = norm_of(model)
    before = model(x)
    graft = replaced(model, x, ramp_steps=4).graft
    rms = F.rms_norm(x, (WIDTH,), host.weight, 1e-5)
    outputs = []
    for _ in range(5):
        outputs.append(model(x))
        graft.on_step()
    assert torch.equal(outputs[0], before)
    torch.testing.assert_close(outputs[1], 0.75 * before + 0.25 * rms)
    torch.testing.assert_close(outputs[2], 0.5 * before + 0.5 * rms)
    assert torch.equal(outputs[4], rms)
    graft.on_step()
    assert alpha_of(graft) == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_the_output_keeps_the_hosts_dtype_all_the_way(dtype: torch.dtype) -> None:
    model, x = trained_norm()
    model, x = model.to(dtype), x.to(dtype)
    before = model(x)
    graft = replaced(model, x, ramp_steps=1).graft
    assert torch.equal(model(x), before)
    graft.on_step()
    assert model(x).dtype == dtype
    expected = F.rms_norm(x.float(), (WIDTH,), norm_of(model).weight.float(), 1e-5)
    torch.testing.assert_close(model(x).float(), expected, rtol=1e-2, atol=1e-2)


def test_a_hosts_gain_that_is_trained_on_does_not_change_the_graft() -> None:
    model, x = trained_norm()
    graft = replaced(model, x).graft
    inherited = gain_of(graft).clone()
    with torch.no_grad():
        norm_of(model).weight.mul_(3.0)
    assert torch.equal(gain_of(graft), inherited)


class LayerNorm(nn.Module):
    """Somebody's own, which normalises axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.std(dim=1, keepdim=True) * self.weight


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LayerNorm((5, WIDTH)),
        lambda: nn.LayerNorm((2, WIDTH), bias=False),  # as many weights as with a bias
        LayerNorm,
        lambda: nn.RMSNorm(WIDTH),
        lambda: nn.Linear(WIDTH, WIDTH),
    ],
    ids=["two_axes", "two_axes_no_bias", "own_class", "rms_norm", "linear"],
)
def test_what_is_not_a_layer_norm_over_the_last_axis_is_refused(
    make: Callable[[], nn.Module],
) -> None:
    layer = make()
    rows = getattr(layer, "normalized_shape", (5, WIDTH))[0]
    model, x = nn.Sequential(layer), torch.randn(2, rows, WIDTH)
    before = model(x)
    with pytest.raises(IncompatibleLayerError, match="cannot be grafted"):
        replaced(model, x)
    assert torch.equal(model(x), before)


def test_a_replacement_that_never_wakes_up_gets_no_certificate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = trained_norm()
    blueprint = blueprints.get_blueprint("ln_rms")
    info = describe(model, x)
    asleep = blueprint.build(info, seed=0)
    monkeypatch.setattr(type(asleep), "on_step", lambda self: None)
    with pytest.raises(CertificateError, match="no"):
        apply_graft(model, info, blueprint, graft=asleep, x=x)


def test_trying_a_graft_leaves_its_schedule_at_the_start() -> None:
    model, x = trained_norm()
    info, blueprint = describe(model, x), blueprints.get_blueprint("ln_rms")
    receipt = apply_graft(model, info, blueprint, x=x, thorough=True)
    assert alpha_of(receipt.graft) == 0.0


def test_a_copy_of_the_model_is_independent() -> None:
    model, x = trained_norm()
    graft = replaced(model, x, ramp_steps=2).graft
    copied = copy.deepcopy(model)
    graft.on_step()
    assert not torch.equal(model(x), copied(x))


def test_a_checkpoint_brings_the_gain_and_the_place_on_the_ramp_back() -> None:
    model, x = trained_norm()
    graft = replaced(model, x, ramp_steps=4).graft
    with torch.no_grad():
        gain_of(graft).mul_(2.0)
    graft.on_step()
    fresh, _ = trained_norm()
    manifest = structure(model)
    assert manifest[0]["alpha"] == 0.25
    (receipt,) = rebuild(fresh, manifest)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    receipt.graft.on_step()
    assert alpha_of(receipt.graft) == 0.5


def test_an_exported_model_stays_at_its_place_on_the_ramp() -> None:
    model, x = trained_norm()
    graft = replaced(model, x, ramp_steps=2).graft
    graft.on_step()
    exported = esper.export(model)
    graft.on_step()
    assert not torch.equal(exported(x), model(x))


def test_a_compiled_model_is_not_compiled_again_as_the_ramp_goes_on() -> None:
    model, x = trained_norm()
    receipt = replaced(model, x, ramp_steps=8)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(8):
        receipt.graft.on_step()
        assert torch.equal(compiled(x), model(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def attach(training: Training) -> esper.Session:
    return esper.attach(
        training.model, training.optimizer, run="ramp", scheduler=training.scheduler
    )


def go_on(session: esper.Session, training: Training, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        losses.append(training.step())
        session.step(losses[-1])
    return losses


def test_a_session_moves_the_ramp_on_once_a_step_and_undoes_it_to_the_bit() -> None:
    plain = make_training()
    plain.run(3)
    expected = plain.run(10)
    training = make_training()
    with attach(training) as session:
        go_on(session, training, 3)
        receipt = session.graft("blocks.1.norm", "ln_rms", ramp_steps=10)
        first, *_ = go_on(session, training, 4)
        assert first == expected[0]
        assert alpha_of(receipt.graft) == pytest.approx(0.4)
        assert session.undo(receipt).exact
        training.steps = 3
        assert go_on(session, training, 10) == expected


def test_the_guard_brings_an_older_ramp_back_to_where_it_was() -> None:
    def halfway() -> tuple[Training, esper.Session, Receipt]:
        training = make_training()
        session = attach(training)
        go_on(session, training, 3)
        receipt = session.graft("blocks.1.norm", "ln_rms", ramp_steps=10)
        go_on(session, training, 2)
        return training, session, receipt

    training, session, _ = halfway()
    with session:
        expected = go_on(session, training, 6)

    training, session, ramp = halfway()
    with session:
        younger = session.graft("blocks.0.wide", "proj_ia3")
        go_on(session, training, 2)
        training.step()
        session.step(math.nan)
        assert not younger.present
        assert alpha_of(ramp.graft) == pytest.approx(0.2)
        training.steps = 5
        assert go_on(session, training, 6) == expected


def test_a_session_goes_on_with_the_ramp_where_its_checkpoint_left_it() -> None:
    training = make_training()
    with attach(training) as session:
        go_on(session, training, 2)
        session.graft("blocks.0.norm", "ln_rms", ramp_steps=10)
        go_on(session, training, 3)
        saved, weights = session.state_dict(), copy.deepcopy(training.model.state_dict())
    again = make_training()
    with attach(again) as session:
        session.load_state_dict(saved)
        again.model.load_state_dict(weights)
        go_on(session, again, 1)
        (entry,) = session.adaptations
        assert entry.receipt is not None
        assert alpha_of(entry.receipt.graft) == pytest.approx(0.4)
