"""The layer graph comes from what the model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from esper import blueprints
from esper.contracts import LayerInfo
from esper.grafting import LayerRecorder, apply_graft, digest, prepare_slots, trace_layers
from tests.esper.tiny_models import TinyConvNet, TinyTransformer


def traced(model: nn.Module, *inputs: Tensor) -> dict[str, LayerInfo]:
    return {info.name: info for info in trace_layers(model, lambda: model(*inputs))}


TOKENS = torch.arange(10).reshape(2, 5)


def test_layers_come_in_order_of_execution_with_shapes() -> None:
    infos = trace_layers(model := TinyTransformer(), lambda: model(TOKENS))
    ran = [info for info in infos if info.in_shape]
    assert [info.name for info in ran] == [
        "embed",
        "blocks.0.norm",
        "blocks.0.attention",
        "blocks.0.wide",
        "blocks.0.narrow",
        "blocks.1.norm",
        "blocks.1.attention",
        "blocks.1.wide",
        "blocks.1.narrow",
        "head",
    ]
    wide = ran[3]
    assert wide == LayerInfo(
        name="blocks.0.wide",
        kind="Linear",
        in_shape=(2, 5, 16),
        out_shape=(2, 5, 32),
        dtype="float32",
        parameters=16 * 32 + 32,
        graftable=True,
        features_in=16,
        features_out=32,
        order=3,
        feeds=("blocks.0.narrow",),
    )
    assert ran[0].features_in == 0, "token numbers have no channels"


def test_what_cannot_hold_a_graft_says_why() -> None:
    infos = traced(TinyTransformer(), TOKENS)
    unfit = {name: info.reason for name, info in infos.items() if not info.graftable}
    assert set(unfit) == {"blocks.0.attention.out_proj", "blocks.1.attention.out_proj"}
    assert all("never run" in reason for reason in unfit.values())


def test_convolutions_tell_their_geometry() -> None:
    down = traced(TinyConvNet(), torch.randn(2, 3, 8, 8))["down"]
    assert down.channel_axis == 1
    assert (down.features_in, down.features_out) == (8, 16)
    assert (down.kernel_size, down.stride) == ((3, 3), (2, 2))
    assert (down.padding, down.dilation, down.groups) == ((1, 1), (1, 1), 1)
    assert LayerInfo.from_wire(down.to_wire()) == down


def test_a_reflecting_convolution_takes_no_low_rank_update() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"))
    info = traced(model, torch.randn(1, 4, 6, 6))["0"]
    assert "geometry" in blueprints.get_blueprint("proj_lora_64").supports(info)
    assert blueprints.get_blueprint("proj_ia3").supports(info) == ""


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_same_padding_is_understood_where_it_is_symmetric() -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 5, padding="same"), nn.Conv1d(8, 8, 4, padding="same"))
    infos = traced(model, torch.randn(1, 4, 9))
    assert infos["0"].padding == (2,)
    assert infos["1"].kernel_size == ()


def test_a_layer_that_never_ran_says_so() -> None:
    model = TinyTransformer()
    model.spare = nn.Linear(3, 3)
    spare = traced(model, TOKENS)["spare"]
    assert not spare.graftable
    assert "did not run" in spare.reason


class WithHelpers(nn.Module):
    """Attention from scratch: its parameters are its own, and inside is nothing that has some."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.eye(8))
        self.inside = nn.ModuleDict({"drop": nn.Dropout(0.5), "act": nn.GELU()})

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inside["drop"](self.inside["act"](x @ self.mixing))
        return found


class Parametered(nn.Module):
    """A block with a parameter beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))
        self.attention = WithHelpers()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.gain * self.attention(x)
        return found


def test_a_layer_may_contain_what_has_no_parameters() -> None:
    infos = traced(Parametered(), torch.randn(3, 8))

    assert set(infos) == {"attention"}
    assert infos["attention"].kind == "WithHelpers"
    assert infos["attention"].out_shape == (3, 8)
    assert infos["attention"].graftable


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_layers_that_are_prepared_for_quantisation_are_seen_and_take_no_graft() -> None:
    quantisation: Any = torch.ao.quantization
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model.qconfig = quantisation.get_default_qat_qconfig("x86")  # type: ignore[assignment]
    infos = traced(quantisation.prepare_qat(model.train()), torch.randn(3, 8))

    assert [info.out_shape for info in infos.values()] == [(3, 8), (3, 4)]
    assert all("quantisation" in info.reason for info in infos.values())


def test_a_whole_model_that_is_one_layer_is_not_grafted() -> None:
    model = nn.Linear(3, 3)
    (info,) = trace_layers(model, lambda: model(torch.randn(2, 3)))
    assert not info.graftable
    assert "whole model" in info.reason


def test_a_packed_sequence_is_grafted_through_its_data() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, [4, 2], batch_first=True)
            return self.rnn(packed)[0].data

    model, x = Packed(), torch.randn(2, 4, 3)
    info, before = traced(model, x)["rnn"], model(x)
    assert info.graftable
    receipt = apply_graft(model, info, blueprints.get_blueprint("proj_ia3"))
    assert torch.equal(model(x), before)
    with torch.no_grad():
        next(receipt.graft.parameters()).fill_(2.0)
    assert torch.equal(model(x), 2.0 * before)


def test_a_weight_norm_layer_goes_by_its_own_kind() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.Linear(8, 2))
    x = torch.randn(3, 8)
    info = traced(model, x)["0"]
    assert (info.kind, info.graftable) == ("Linear", True)
    before, expected = digest(model), model(x)
    receipt = apply_graft(model, info, blueprints.get_blueprint("proj_lora_64"))
    assert torch.equal(model(x), expected)
    with pytest.raises(TypeError, match="cannot be merged"):
        receipt.graft.merge(model[0])
    assert receipt.undo().digest == before


def test_a_module_under_two_names_is_one_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.add_module("again", model[0])
    infos = traced(model, torch.randn(2, 4))
    assert list(infos) == ["0"]
    assert infos["0"].calls == 2


def test_grafts_are_no_layers_of_the_model() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(2, 8)
    infos = traced(model, x)
    apply_graft(model, infos["0"], blueprints.get_blueprint("proj_lora_64"))
    again = traced(model, x)
    assert list(again) == ["0", "1"]
    assert again["0"].parameters == infos["0"].parameters


def test_the_recorder_leaves_outputs_as_they_are_and_then_leaves() -> None:
    model = TinyTransformer().eval()
    expected = model(TOKENS)
    prepare_slots(model, ["head"])
    recorder = LayerRecorder(model, forwards=2)
    assert torch.equal(model(TOKENS), expected)
    assert not recorder.done
    assert torch.equal(model(TOKENS), expected)
    assert recorder.done
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not model.blocks[0].wide._forward_hooks
    assert {info.calls for info in recorder.layers()} == {1}


def test_a_model_that_raises_while_it_is_recorded_can_be_run_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    recorder = LayerRecorder(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5))
    model(torch.randn(2, 4))
    assert recorder.done
    assert {info.name: info.calls for info in recorder.layers()} == {"0": 1, "1": 1}


def test_tracing_leaves_modes_buffers_and_random_streams_alone() -> None:
    model = TinyConvNet()
    before, stream = digest(model), torch.get_rng_state()
    traced(model, torch.zeros(2, 3, 8, 8))
    assert digest(model) == before
    assert model.training
    assert torch.equal(torch.get_rng_state(), stream)


def test_a_model_whose_parts_are_called_directly_is_learnt_too() -> None:
    model = TinyTransformer()
    recorder = LayerRecorder(model)
    model.head(model.embed(TOKENS))
    recorder.stop()
    infos = {info.name: info for info in recorder.layers()}
    assert infos["embed"].feeds == ("head",)
    assert infos["head"].graftable
