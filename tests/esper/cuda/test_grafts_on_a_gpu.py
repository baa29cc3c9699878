"""Grafts on a GPU: the same output at birth, and an undo to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import esper
from esper import blueprints
from esper.exceptions import IncompatibleLayerError
from tests.esper.cuda.device import DEVICE, needs_device

pytestmark = [pytest.mark.cuda, needs_device]
DTYPES = {"fp32": None, "bf16": torch.bfloat16}
LAYERS = ("linear", "convolution", "norm")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.convolution(x)).flatten(2).mT
        y: torch.Tensor = self.head(F.gelu(self.linear(self.norm(h)))).mean(1)
        return y


def train(model: nn.Module, optimizer: Any, x: torch.Tensor, dtype: Any, steps: int) -> None:
    for _ in range(steps):
        with torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long, device=DEVICE))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("slug", [blueprint.slug for blueprint in blueprints.all()])
def test_a_graft_is_exact_at_birth_and_its_undo_to_the_bit(
    slug: str, layer: str, dtype: str
) -> None:
    torch.manual_seed(0)
    model = Model().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x = torch.randn(4, 3, 6, 6, device=DEVICE)
    train(model, optimizer, x, DTYPES[dtype], 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        output = model(x)
    try:
        receipt = esper.graft(model, layer, slug, optimizer=optimizer, sample=x)
    except IncompatibleLayerError as refused:
        pytest.skip(str(refused))
    with torch.no_grad():
        born = model(x)
    train(model, optimizer, x, DTYPES[dtype], 2)
    receipt.undo()

    assert torch.allclose(born, output, rtol=1e-4, atol=1e-5)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
