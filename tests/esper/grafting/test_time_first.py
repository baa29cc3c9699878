"""Models that take time before the batch: attention beside their layers looks along time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import blueprints
from esper.contracts import LayerInfo
from esper.exceptions import IncompatibleLayerError
from esper.grafting import trace_layers
from tests.esper.sdk.tiny_training import slot_at

TIME, BATCH, WIDTH = 7, 3, 8


def encoder(*, batch_first: bool = False) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(
        WIDTH, 2, 16, dropout=0.0, activation="relu", batch_first=batch_first
    )
    return nn.TransformerEncoder(block, 2, enable_nested_tensor=False)


def layer_of(model: nn.Module, name: str, *inputs: Tensor) -> LayerInfo:
    layers = trace_layers(model, lambda: model(*inputs))
    return next(layer for layer in layers if layer.name == name)


def awaken(model: nn.Module, layer: str, blueprint: str) -> None:
    """As if it had learnt: what is zero at birth is not."""
    with torch.no_grad():
        for graft in slot_at(model, layer).grafts().values():
            for parameter in graft.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.3)


@pytest.mark.parametrize("blueprint", ["attn_std", "attn_split_qk"])
@pytest.mark.parametrize("time", [TIME, BATCH], ids=["longer", "square"])
def test_a_branch_in_a_time_first_encoder_mixes_times_and_no_rows(
    blueprint: str, time: int
) -> None:
    model = encoder().train()
    x = torch.randn(time, BATCH, WIDTH)
    esper.graft(model, "layers.0.linear1", blueprint, sample=x, causal=False)
    awaken(model, "layers.0.linear1", blueprint)
    with torch.no_grad():
        before = model(x)
        other_row, other_time = x.clone(), x.clone()
        other_row[:, 1] += 1.0
        other_time[1, :] += 1.0
        assert torch.equal(model(other_row)[:, 0], before[:, 0])
        assert not torch.equal(model(other_time)[0], before[0])


def test_a_batch_first_encoder_is_as_it_was() -> None:
    model = encoder(batch_first=True)
    layer = layer_of(model, "layers.0.linear1", torch.randn(BATCH, TIME, WIDTH))
    assert layer.sequence_axis == 1


class Transposing(nn.Module):
    """Batch first, but for the recurrent part in its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.rnn = nn.LSTM(WIDTH, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(self.embed(x).transpose(0, 1))
        return self.head(self.inner(y).transpose(0, 1))


def test_each_layer_of_a_model_that_transposes_has_its_own_axis() -> None:
    layers = trace_layers(model := Transposing(), lambda: model(torch.randn(BATCH, TIME, WIDTH)))
    axes = {layer.name: layer.sequence_axis for layer in layers}
    assert axes == {"embed": 1, "rnn": 0, "inner": 0, "head": 1}


def test_where_sizes_do_not_tell_the_branch_is_refused_in_words() -> None:
    model = Transposing()
    x = torch.randn(BATCH, BATCH, WIDTH)
    assert layer_of(model, "embed", x).sequence_axis == -1
    with pytest.raises(IncompatibleLayerError, match="does not show which axis is time"):
        esper.graft(model, "embed", "attn_std", sample=x)
    assert blueprints.get_blueprint("proj_lora_64").supports(layer_of(model, "embed", x)) == ""
