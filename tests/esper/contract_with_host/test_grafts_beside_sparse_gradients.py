"""A layer with sparse gradients takes a graft or refuses it in words; the training goes on."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.exceptions import IncompatibleLayerError


class Lookup(nn.Module):
    def __init__(self, table: nn.Module, *, flat: bool) -> None:
        super().__init__()
        self.table = table
        self.flat = flat
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.table(x)
        out: Tensor = self.last(found if self.flat else found.mean(1))
        return out


def embedding() -> Lookup:
    return Lookup(nn.Embedding(50, 8, sparse=True), flat=False)


def bag() -> Lookup:
    return Lookup(nn.EmbeddingBag(50, 8, sparse=True), flat=True)


@pytest.mark.cover(values=1)
@pytest.mark.parametrize("make", [embedding, bag])
@pytest.mark.parametrize("blueprint", [b.slug for b in esper.blueprints.all()])
def test_it_fits_and_trains_or_is_refused_in_words(make: type[Lookup], blueprint: str) -> None:
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    receipt = None
    with esper.attach(model, optimizer, run="sparse", server="") as session:
        for step in range(6):
            loss = model(torch.randint(0, 50, (16, 5))).square().mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            session.step(loss)
            if step == 2:
                with suppress(IncompatibleLayerError):
                    receipt = session.graft("table", blueprint)
        if receipt is not None:
            session.undo(receipt)


def test_a_bound_of_the_gradient_names_sparse_gradients_as_the_reason() -> None:
    model = embedding()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(IncompatibleLayerError, match="its gradients are sparse"):
        esper.graft(
            model,
            "table",
            "clamp_grad_norm",
            optimizer=optimizer,
            sample=torch.randint(0, 50, (16, 5)),
        )
