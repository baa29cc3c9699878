"""A graft runs in compiled code also where other models of the same class run compiled."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import esper

CALLS = ["before", "between", "before and between"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def blocks(*, whole: bool) -> tuple[nn.Sequential, nn.Module]:
    """A model, and what to call."""
    model = nn.Sequential(Block(), Block())
    if whole:
        return model, torch.compile(model, backend="eager", fullgraph=True)  # type: ignore[return-value]
    for block in model:
        block.compile(backend="eager", fullgraph=True)
    return model, model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of a block's input
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by_block"])
@pytest.mark.parametrize("called", CALLS)
def test_a_graft_runs_where_another_model_of_the_class_runs_compiled(
    called: str, whole: bool
) -> None:
    """A teacher, or the other half of a GAN: torch shares its code, which has no hooks."""
    torch.compiler.reset()
    model, call = blocks(whole=whole)
    _, other = blocks(whole=whole)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(4, 8, requires_grad=True)
    with esper.attach(model, optimizer, mode="supervised", server="", verbose=False) as session:
        if "before" in called:
            other(x).sum().backward()
        for _ in range(3):
            optimizer.zero_grad()
            loss = call(x).square().mean()
            loss.backward()
            optimizer.step()
            session.step(loss)
            if "between" in called:
                other(x).sum().backward()
        graft = session.graft("1.up", "proj_lora_64").graft
        with torch.no_grad():
            for parameter in graft.parameters():
                parameter.fill_(0.5)
        compiled = call(x)
        compiled.sum().backward()
        with torch.compiler.set_stance("force_eager"):
            assert torch.allclose(compiled, model(x))
        assert all(parameter.grad is not None for parameter in graft.parameters())


@pytest.mark.parametrize("method", ["copy", "pickle", "undo"])
def test_what_keeps_the_code_apart_goes_where_the_layer_goes(method: str) -> None:
    model = nn.Sequential(Block(), Block())
    x = torch.randn(4, 8)
    receipt = esper.graft(model, "1.up", "proj_lora_64", sample=x)
    if method == "undo":
        receipt.undo()
        assert all("forward" not in module.__dict__ for module in model.modules())
        return
    made = copy.deepcopy(model) if method == "copy" else pickle.loads(pickle.dumps(model))  # noqa: S301
    expected = model(x)
    with torch.no_grad():
        made[1].up.weight.zero_()  # the layer runs on its own weights, not on those of the model
    assert made[1].up.forward.__self__ is made[1].up
    assert torch.equal(model(x), expected)
    assert not torch.equal(made(x), expected)
