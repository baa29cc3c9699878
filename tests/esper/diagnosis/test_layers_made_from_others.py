"""Rules read a class that a library made from a layer of torch as they read that layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper


class Positions(nn.Embedding):
    """As Bart's: a table with places for longer texts than those that come."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(torch.arange(tokens.shape[1]).expand(tokens.shape) + 2)


class Bags(nn.EmbeddingBag):
    """One bag for each text."""


class Narrowed(nn.ConvTranspose1d):
    """Its matrix has inputs as rows."""


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.tokens, self.places = nn.Embedding(12, 8), Positions(256, 8)
        self.bags, self.wider = Bags(256, 8), Narrowed(64, 8, 1)
        self.head = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, tokens: Tensor) -> Any:
        x = self.tokens(tokens)
        if self.kind == "positions":
            x = x + self.places(tokens)
        elif self.kind == "bags":
            x = x + self.bags(tokens)[:, None]
        else:
            rare = F.pad(x, (0, 56))  # most of its inputs are zero: they are another layer's matter
            x = self.wider(rare.transpose(1, 2)).transpose(1, 2)
        return self.head(x.mean(1))


@pytest.mark.parametrize("kind", ["positions", "bags", "transposed"])
def test_rows_that_no_batch_uses_are_not_dead_units(kind: str) -> None:
    torch.manual_seed(0)
    net = Net(kind)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    with esper.attach(net, optimizer, server="", verbose=False) as session:
        for _ in range(30):
            tokens = torch.randint(12, (16, 6))
            loss = F.cross_entropy(net(tokens), tokens[:, 0] % 3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.step(loss)
        assert [f.observed for f in session.findings() if f.slug == "dying_relu"] == []
