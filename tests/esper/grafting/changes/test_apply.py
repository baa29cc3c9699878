"""Applying a graft is all or nothing."""

from __future__ import annotations

import math
import sys
import warnings
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import esper
from esper import blueprints
from esper.blueprints import Blueprint, Graft
from esper.blueprints.catalog.proj_ia3 import ChannelGain, ProjIa3
from esper.blueprints.initial import Initializer
from esper.contracts import Certificate, LayerInfo
from esper.exceptions import (
    CertificateError,
    ConfigurationError,
    IncompatibleLayerError,
    UnknownBlueprintError,
    UnknownLayerError,
)
from esper.grafting import (
    Slot,
    Snapshot,
    SnapshotMemory,
    Surroundings,
    apply_graft,
    companions_of,
    digest,
    slot_of,
    structure,
    trace_layers,
)
from esper.grafting.changes import apply
from tests.esper.tiny_models import TinyConvNet, Training, make_training, surroundings_of

TARGET = "blocks.1.wide"


def info_of(training: Training, layer: str = TARGET) -> LayerInfo:
    tokens = training.batches[0][:, :-1]
    infos = trace_layers(training.model, lambda: training.model(tokens))
    return next(info for info in infos if info.name == layer)


class WrongGain(ProjIa3):
    """Starts at two: changes the output at birth."""

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        gain = nn.Parameter(torch.full((layer.features_out,), 2.0))
        return ChannelGain(gain, channel_axis=layer.channel_axis)


class DeadBranch(Graft):
    """Both sides zero: its gradient is zero for ever."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(width))
        self.b = nn.Parameter(torch.zeros(()))

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.a * self.b


class Dead(ProjIa3):
    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        return DeadBranch(layer.features_out)

    def parameters(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return layer.features_out + 1


class RandomGain(ChannelGain):
    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        torch.rand(1)
        return super().combine(x, y)


class Drawing(ProjIa3):
    """Consumes the host's random stream."""

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        return RandomGain(weights.ones(layer.features_out), channel_axis=layer.channel_axis)


class Overwriting(ProjIa3):
    """Writes to the layer's output."""

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        return InPlaceGain(weights.ones(layer.features_out), channel_axis=layer.channel_axis)


class InPlaceGain(ChannelGain):
    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        return y.mul_(self.gain)


class Underdeclared(ProjIa3):
    def parameters(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return layer.features_out - 1


class Meddling(ProjIa3):
    """Keeps the output and doubles the host's gradient."""

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        return MeddlingGain(weights.ones(layer.features_out), channel_axis=layer.channel_axis)


class MeddlingGain(ChannelGain):
    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        return super().combine(x, y) + (y - y.detach())


BAD = [
    (WrongGain, "changes the output right after the graft"),
    (Dead, "none of its tensors has a gradient"),
    (Drawing, "global random stream"),
    (Overwriting, "writes to the layer's tensors"),
    (Underdeclared, "are declared"),
    (Meddling, "gradients of the layer's own"),
]


@pytest.mark.parametrize(("bad", "failure"), BAD, ids=[bad.__name__ for bad, _ in BAD])
def test_a_bad_blueprint_is_refused_by_its_certificate(bad: type[Blueprint], failure: str) -> None:
    training = make_training()
    training.run(2)
    info = info_of(training)
    state = Snapshot.take(training.model, surroundings_of(training))
    before = digest(training.model)
    with pytest.raises(CertificateError, match=failure) as refused:
        apply_graft(
            training.model,
            info,
            bad(),
            surroundings=surroundings_of(training),
        )
    assert not refused.value.certificate.passed
    assert digest(training.model) == before
    assert state.differences() == []
    assert structure(training.model) == []
    assert slot_of(training.model.blocks[1].wide) is None
    training.run(2)


class Boom(BaseException):  # not an Exception: nothing on the way may swallow it
    """Thrown by the test at one line of the apply path."""


SURGERY_FILES = (
    "/grafting/changes/apply.py",
    "/grafting/slot.py",
    "/grafting/trained_tensors/ledger.py",
)


def raise_at_line(number: int) -> Any:
    """A trace function that raises at the n-th line run in the files that swap a graft in."""
    seen = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.endswith(SURGERY_FILES):
            return None
        if frame.f_code.co_name in (
            "_withdraw",
            "_take_out",
            "take_out",
            "remove_slots",
            "remove",
            "grafts",
            "slots",
        ):
            return None  # the way back
        if event == "line":
            seen += 1
            if seen == number:
                sys.settrace(None)
                raise Boom
        return trace

    return trace


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.full)])
def test_an_exception_at_any_line_leaves_everything_as_it_was(every: int) -> None:
    training = make_training()
    training.run(2)
    info = info_of(training)
    surroundings = surroundings_of(training)
    state = Snapshot.take(training.model, surroundings)
    before = digest(training.model)
    for line in range(1, 2000, every):
        sys.settrace(raise_at_line(line))
        try:
            receipt = apply_graft(
                training.model,
                info,
                blueprints.get_blueprint("proj_lora_64"),
                surroundings=surroundings,
            )
        except Boom:
            assert digest(training.model) == before, line
            assert state.differences() == [], line
            assert slot_of(training.model.blocks[1].wide) is None, line
        else:
            break
        finally:
            sys.settrace(None)
    assert line > 60, "the injection reached no depth"
    assert receipt.present


def test_the_certificate_waits_for_no_copy_of_the_rest_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On a GPU the copies to the host come one after the other, and a reading waits for them.
    training = make_training()
    training.run(2)
    of_layer = {*training.model.get_submodule(TARGET).parameters(), *training.model.buffers()}
    moments = [value for state in training.optimizer.state.values() for value in state.values()]
    everything = {*training.model.parameters(), *training.model.buffers(), *moments}
    gradients = {p.grad for p in training.model.parameters() if p.grad is not None}
    copied: set[Tensor] = set()
    at: dict[str, set[Tensor]] = {}
    copy, certify, insert = SnapshotMemory.copy, apply.certify, Slot.insert

    def noting_copy(memory: SnapshotMemory, tensor: Tensor) -> Tensor:
        copied.add(tensor)
        return copy(memory, tensor)

    def noting_certify(*args: Any, **kwargs: Any) -> Certificate:
        certificate = certify(*args, **kwargs)
        at["certificate"] = set(copied)
        return certificate

    def noting_insert(*args: Any) -> None:
        at["insertion"] = set(copied)
        insert(*args)

    monkeypatch.setattr(SnapshotMemory, "copy", noting_copy)
    monkeypatch.setattr(apply, "certify", noting_certify)
    monkeypatch.setattr(Slot, "insert", noting_insert)
    blueprint = blueprints.get_blueprint("proj_lora_64")
    around, info = surroundings_of(training), info_of(training)
    before = digest(training.model)
    receipt = apply_graft(training.model, info, blueprint, surroundings=around)
    assert at["certificate"] & everything == of_layer
    assert at["insertion"] >= everything | gradients
    training.run(2)
    assert receipt.undo().exact
    assert digest(training.model) == before


def test_a_refusal_comes_before_anything_is_touched() -> None:
    training = make_training()
    info = info_of(training, "blocks.0.attention.out_proj")
    with pytest.raises(IncompatibleLayerError, match="graft would never run"):
        apply_graft(training.model, info, blueprints.get_blueprint("mon_act_stats"))


def test_a_layer_carries_a_blueprint_once() -> None:
    training = make_training()
    info = info_of(training)
    apply_graft(training.model, info, blueprints.get_blueprint("proj_ia3"))
    with pytest.raises(IncompatibleLayerError, match="has this blueprint already"):
        apply_graft(training.model, info, blueprints.get_blueprint("proj_ia3"))


def test_blueprints_that_conflict_do_not_share_a_layer() -> None:
    class Rival(ProjIa3):
        slug = "mlp_swiglu_4096"

    training = make_training()
    info = info_of(training)
    apply_graft(training.model, info, Rival())
    with pytest.raises(IncompatibleLayerError, match="conflicts with mlp_swiglu_4096"):
        apply_graft(training.model, info, blueprints.get_blueprint("mlp_gelu_2048"))


def test_the_gradient_clamp_refuses_to_work_behind_a_gradient_scaler() -> None:
    training = make_training()

    class EnabledScaler:
        def is_enabled(self) -> bool:
            return True

    with pytest.raises(IncompatibleLayerError, match="gradient scaler"):
        apply_graft(
            training.model,
            info_of(training),
            blueprints.get_blueprint("clamp_grad_norm"),
            surroundings=Surroundings(scaler=EnabledScaler()),
        )


@pytest.mark.parametrize(
    ("slug", "config"),
    [
        ("proj_lora_64", {"rank": 0}),
        ("proj_lora_64", {"rank": True}),
        ("proj_lora_64", {"rank": 4, "size": 1}),
        ("proj_lora_64", {"alpha": float("nan")}),
        ("mlp_gelu_2048", {"hidden": 10**9}),
        ("attn_std", {"width": 10, "heads": 3}),
        ("attn_std", {"causal": 1}),
        ("mon_act_stats", {"every": 0}),
        ("clamp_grad_norm", {"max_norm": -1.0}),
        ("proj_ia3", {"gain": 2}),
    ],
)
def test_invalid_settings_are_refused(slug: str, config: dict[str, Any]) -> None:
    training = make_training()
    with pytest.raises(ConfigurationError):
        apply_graft(
            training.model, info_of(training), blueprints.get_blueprint(slug), config=config
        )


def test_the_public_graft_needs_no_run_and_no_sample_for_a_linear_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(4, 8)
    expected = model(x)
    receipt = esper.graft(model, "0", "BP-PROJ-LoRA-64", optimizer=optimizer, rank=1)
    assert receipt.certificate.passed
    assert receipt.certificate.undo_exact
    assert torch.equal(model(x), expected)
    assert receipt.config["rank"] == 1
    (companion,) = companions_of(optimizer)
    assert set(companion.parameters) == set(receipt.graft.parameters())
    assert receipt.undo().exact
    assert companions_of(optimizer) == ()


def test_the_public_graft_sees_a_convolution_through_a_sample() -> None:
    model = TinyConvNet()
    x = torch.randn(2, 3, 8, 8)
    buffers = digest(model)
    with pytest.raises(UnknownLayerError, match="sample="):
        esper.graft(model, "down", "mlp_gelu_2048")
    expected = TinyConvNet()
    expected.load_state_dict(model.state_dict())
    receipt = esper.graft(model, "down", "mlp_gelu_2048", sample=x)
    assert receipt.digest_before == buffers, "running the sample left batch norm alone"
    assert torch.equal(model(x), expected(x))
    model(x).sum().backward()  # the in-place ReLU behind the graft is no trouble


@pytest.mark.parametrize("layer", ["", "blocks", "blocks.0", "nowhere"])
def test_what_is_no_layer_is_refused_with_a_sentence(layer: str) -> None:
    training = make_training()
    with pytest.raises(
        UnknownLayerError,
        match=r"whole model|container|contains other layers|has no parameters|no layer",
    ):
        esper.graft(training.model, layer, "proj_ia3", sample=training.batches[0])


def test_an_unknown_blueprint_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(UnknownBlueprintError, match="proj_lora_64"):
        esper.graft(model, "0", "proj_lora_65")


@pytest.mark.parametrize("make", ["weight_norm", "spectral_norm", "prune"])
def test_a_layer_whose_weight_a_hook_makes_is_certified_on_that_weight(make: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    if make == "prune":
        prune.l1_unstructured(layer, "weight", amount=0.5)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            getattr(nn.utils, make)(layer)
    model = nn.Sequential(layer)
    x = torch.randn(3, 6)
    model(x).sum().backward()  # the weight on the layer belongs to a graph that is gone
    before, weight = digest(model), layer.weight
    receipt = esper.graft(model, "0", "mlp_gelu_2048")
    assert receipt.certificate.passed
    assert layer.weight is weight
    receipt.undo()
    assert digest(model) == before


def test_a_certificate_draws_a_few_rows_however_large_the_batch_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a batch of images a CPU takes longer for the numbers than for a training step."""
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    infos = trace_layers(model, lambda: model(torch.randn(1000, 32)))
    drawn: list[int] = []
    randn = torch.randn

    def counted(shape: Any, **options: Any) -> Tensor:
        drawn.append(math.prod(shape))
        return randn(shape, **options)

    monkeypatch.setattr(torch, "randn", counted)
    receipt = apply_graft(model, infos[0], blueprints.get_blueprint("proj_lora_64"))
    assert drawn
    assert sum(drawn) <= 20 * 32
    assert not math.isnan(receipt.record.certificate.latency_ms)  # it is timed on the whole batch
