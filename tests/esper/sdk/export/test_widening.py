"""A graft that spans two linear layers is exported as a wider hidden layer, or refused in words."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.exceptions import ConfigurationError
from tests.esper.grafting.test_spans import awake


class Functional(nn.Module):
    """GELU as a function, dropout, no bias in the first layer, and a part that is not around."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"up": nn.Linear(6, 4, bias=False), "down": nn.Linear(4, 3)})
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["down"](self.drop(F.gelu(self.inner["up"](x))))


class Skipping(nn.Module):
    """Something else reads the hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 4)
        self.fc2 = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.fc1(x))
        return self.fc2(hidden) + hidden.mean()


def sequential(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4), *between, nn.Linear(4, 3))


def branched(model: nn.Module, since: str, layer: str, slug: str = "widen_hidden") -> Tensor:
    x = torch.randn(5, 6)
    model.eval()
    esper.graft(model, layer, slug, since=since, hidden=28, optimizer=None, sample=x)
    awake(model)
    return x


@pytest.mark.parametrize(
    ("model", "since", "layer", "slug"),
    [
        (sequential(nn.ReLU()), "0", "2", "widen_hidden"),
        (sequential(nn.Tanh(), nn.Dropout(0.5)), "0", "3", "widen_hidden"),
        (Functional(), "inner.up", "inner.down", "widen_hidden"),
        (sequential(nn.GELU()), "0", "2", "mlp_gelu_2048"),
    ],
)
def test_it_becomes_a_wider_hidden_layer(
    model: nn.Module, since: str, layer: str, slug: str, tmp_path: Path
) -> None:
    sequence = isinstance(model, nn.Sequential)
    fresh = nn.Sequential(*map(_again, model.children())) if sequence else Functional()
    x = branched(model, since, layer, slug)
    plain = esper.export(model, tmp_path)
    torch.testing.assert_close(plain(x), model(x))
    assert plain.get_submodule(since).weight.shape == (32, 6)
    assert plain.get_submodule(layer).in_features == 32
    assert not any(".esper" in name for name, _ in plain.named_modules())
    assert not plain._forward_pre_hooks
    loaded = _loader(tmp_path)(fresh, tmp_path)
    torch.testing.assert_close(loaded.eval()(x), model(x))


@pytest.mark.parametrize(
    ("model", "layer", "slug", "words"),
    [
        (sequential(nn.ReLU()), "2", "mlp_gelu_2048", "is relu, and the graft has gelu"),
        (sequential(nn.ReLU()), "2", "mlp_swiglu_4096", "one activation"),
        (sequential(nn.BatchNorm1d(4), nn.ReLU()), "3", "widen_hidden", "not an activation alone"),
    ],
)
def test_what_cannot_be_merged_is_said(model: nn.Module, layer: str, slug: str, words: str) -> None:
    branched(model, "0", layer, slug)
    with pytest.raises(ConfigurationError, match=words):
        esper.export(model)


def test_a_hidden_layer_that_is_read_elsewhere_is_left_as_it_is() -> None:
    model = Skipping()
    branched(model, "fc1", "fc2")
    with pytest.raises(ConfigurationError, match="read elsewhere"):
        esper.export(model)


def _again(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Linear):
        return nn.Linear(module.in_features, module.out_features)
    return module


def _loader(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("grafted", folder / "grafted.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load
