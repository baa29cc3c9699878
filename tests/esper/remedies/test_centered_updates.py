"""A layer whose updates are centred learns as one whose inputs have no mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.remedies.centered_updates import CenteredUpdates

MEAN = 3.0
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),
}


class Conv1D(nn.Module):
    """As in transformers: the weight is [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (32, 6)),
    "conv1d of transformers": (lambda: Conv1D(6, 4), (32, 6)),
    "convolution": (lambda: nn.Conv2d(6, 4, 3), (8, 6, 5, 5)),
    "groups": (lambda: nn.Conv1d(6, 4, 3, groups=2), (8, 6, 9)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_it_learns_as_if_the_mean_were_taken_out_of_its_inputs(layer: str, optimizer: str) -> None:
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    host: Any = make().double()
    torch.manual_seed(0)
    other: Any = make().double()
    with torch.no_grad():  # the same function of the inputs without their mean
        ones = torch.full(shape, MEAN).double()
        common = (other(ones) - other(torch.zeros_like(ones)))[0]
        other.bias.add_(common.flatten(1)[:, 0] if common.dim() > 1 else common)
    own, others = (OPTIMIZERS[optimizer](m.parameters()) for m in (host, other))
    centered = CenteredUpdates(own, host, MEAN)
    numbers = torch.Generator().manual_seed(1)
    for _ in range(30):
        x = torch.randn(shape, generator=numbers).double()
        outputs = []
        for module, inputs, trainer in ((host, x + MEAN, own), (other, x, others)):
            y = module(inputs)
            trainer.zero_grad()
            torch.autograd.backward((y - y.detach().roll(1, 0)).square().mean() + y.mean())
            trainer.step()
            outputs.append(y.detach())
        torch.testing.assert_close(outputs[0], outputs[1])
    centered.end()
    before = [p.detach().clone() for p in (host.weight, host.bias)]
    own.zero_grad()
    torch.autograd.backward(host(x + MEAN).mean())
    raw = host.weight.grad.clone()
    own.step()
    assert torch.equal(host.weight.grad, raw)
    assert not torch.equal(before[0], host.weight)


def test_a_layer_whose_bias_is_not_trained_is_left_as_it_is() -> None:
    results = []
    for changed in (False, True):
        torch.manual_seed(0)
        host = nn.Linear(6, 4)
        host.bias.requires_grad_(False)
        optimizer = torch.optim.SGD([host.weight], lr=0.1)
        if changed:
            CenteredUpdates(optimizer, host, MEAN)
        for _ in range(3):
            optimizer.zero_grad()
            torch.autograd.backward(host(torch.randn(8, 6)).square().mean())
            optimizer.step()
        results.append((host.weight.detach(), host.bias.detach()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
