"""A compiled model with a graft is the graph of the same model written by hand with that branch.

Op by op, forward and backward, so that it does not depend on time; ``benchmarks.grafted`` has the
times.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.nn import functional as F

import esper
from tests.esper.grafting.test_compiled import WAYS, Net

# torch hides this warning of its own; only "error" brings it out.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


class ByHand(nn.Module):
    """A layer, and what a user would write around it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


class LowRank(ByHand):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.down = nn.Parameter(torch.randn(2, 8))
        self.up = nn.Parameter(torch.zeros(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 16.0 / math.sqrt(2) * F.linear(F.linear(x, self.down), self.up)


class Gain(ByHand):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.gain


class Branch(ByHand):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.enter = nn.Linear(8, 32)
        self.leave = nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.leave(F.gelu(self.enter(x)))


# blueprint -> (layer, settings, the same by hand)
BRANCHES: dict[str, tuple[str, dict[str, Any], type[ByHand]]] = {
    "proj_lora_64": ("blocks.1.wide", {"rank": 2}, LowRank),
    "proj_ia3": ("blocks.1.norm", {}, Gain),
    "mlp_gelu_2048": ("blocks.1.wide", {"hidden": 32}, Branch),
}


class Graphs:
    """What autograd hands to a backend, forward and backward: its operations and inputs."""

    def __init__(self) -> None:
        self.made: list[tuple[list[tuple[str, int]], int]] = []
        self.backend = aot_autograd(fw_compiler=self._keep, bw_compiler=self._keep)

    def _keep(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nodes = graph.graph.nodes
        ops = Counter(str(node.target) for node in nodes if node.op == "call_function")
        self.made.append((sorted(ops.items()), sum(node.op == "placeholder" for node in nodes)))
        return make_boxed_func(graph.forward)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def train(run: Any, model: nn.Module, optimizer: torch.optim.Optimizer, session: Any) -> None:
    x = torch.randn(4, 8, requires_grad=True)  # the first block's input is like the second's
    for _ in range(3):
        optimizer.zero_grad()
        loss = run(x).square().mean()
        torch.autograd.backward(loss)
        optimizer.step()
        if session is not None:
            session.step(loss)


def written_by_hand(way: str, blueprint: str) -> Graphs:
    layer, _, branch = BRANCHES[blueprint]
    model, graphs = Net(), Graphs()
    parent, _, name = layer.rpartition(".")
    setattr(model.get_submodule(parent), name, branch(model.get_submodule(layer)))
    run = WAYS[way](model, graphs.backend)
    train(run, model, torch.optim.AdamW(model.parameters()), None)
    return graphs


def grafted(way: str, blueprint: str) -> Graphs:
    layer, settings, _ = BRANCHES[blueprint]
    model, graphs = Net(), Graphs()
    optimizer = torch.optim.AdamW(model.parameters())
    with esper.attach(model, optimizer, mode="supervised", verbose=False, server="") as session:
        run = WAYS[way](model, graphs.backend)
        train(run, model, optimizer, session)
        if way != "regional":  # the code of the model without the graft; a block's is used on
            graphs.made.clear()
        session.graft(layer, blueprint, **settings)
        train(run, model, optimizer, session)
    return graphs


@pytest.mark.parametrize("blueprint", BRANCHES)
@pytest.mark.parametrize("way", ["whole", "regional"])
def test_the_graph_is_that_of_the_branch_by_hand(way: str, blueprint: str) -> None:
    by_hand = written_by_hand(way, blueprint)
    torch.compiler.reset()
    ours = grafted(way, blueprint)

    assert by_hand.made, "something was compiled"
    assert sorted(ours.made) == sorted(by_hand.made), "as many graphs, operations and inputs"
    assert not counters["graph_break"]
