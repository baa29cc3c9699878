"""D1: a graft and its undo, whatever tensors the script or the model holds beside parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import esper

pytestmark = pytest.mark.filterwarnings("ignore:.*(nested|CSR).*:UserWarning")


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)])


def seen_by(transform: Callable[..., Callable[[Tensor], Tensor]]) -> Tensor:
    """What a function inside of a functional transform has put away."""
    kept: list[Tensor] = []
    transform(lambda x: (kept.append(x), x.sum())[1])(torch.randn(8, 8))
    return kept[0]


HELD: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: torch.eye(8).to_sparse(),
    "compressed": lambda: torch.eye(8).to_sparse_csr(),
    "nested": nested,
    "mkldnn": lambda: torch.eye(8).to_mkldnn(),
    "meta": lambda: torch.empty(8, 8, device="meta"),
    "batched": lambda: seen_by(torch.func.vmap),
    "differentiated": lambda: seen_by(torch.func.grad),
}


class Net(nn.Module):
    def __init__(self, *, lazy: bool = False, **buffers: Tensor) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 4)
        self.unused = nn.LazyLinear(3) if lazy else nn.Linear(3, 3)
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).relu())
        return out


def graft_and_undo(model: Net) -> None:
    trained = [*model.first.parameters(), *model.last.parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    session = esper.attach(model, optimizer, mode="supervised", server="", verbose=False)

    def train(steps: int) -> None:
        for _ in range(steps):
            loss = model(torch.randn(16, 8)).square().mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            session.step(loss)

    train(30)
    before = model.last.weight.detach().clone()
    receipt = session.graft("last", "proj_lora_64", rank=2)
    train(3)
    session.undo(receipt)
    assert torch.equal(model.last.weight, before)
    train(3)
    assert not [found for found in session.findings() if "failed" in found.observed]
    session.close()


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("holder", ["list", "dict"])
def test_the_script_holds_it_where_an_average_would_be(kind: str, holder: str) -> None:
    model = Net()
    named = dict(model.named_parameters())
    held = {n: torch.randn_like(p) if p.dim() < 2 else HELD[kind]() for n, p in named.items()}
    kept = held if holder == "dict" else list(held.values())
    graft_and_undo(model)
    assert kept


@pytest.mark.parametrize("kind", ["sparse", "compressed", "nested"])
def test_the_model_has_it_as_a_buffer(kind: str) -> None:
    graft_and_undo(Net(graph=HELD[kind]()))


@pytest.mark.parametrize("others", [0, 2])
def test_a_lazy_layer_of_the_model_or_of_its_like_never_runs(others: int) -> None:
    alike = [Net(lazy=True) for _ in range(others)]
    graft_and_undo(Net(lazy=True))
    assert len(alike) == others
