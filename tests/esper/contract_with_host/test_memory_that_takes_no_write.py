"""D1 and D5: memory that holds the right bits is not written to.

A mapped file is read-only, and a write to it ends the process; a tensor that ``expand`` made has
several elements in one place, and torch refuses the write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper


class Reads(nn.Module):
    """A frozen layer and a table of numbers, beside what trains."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("scale", torch.ones(1).expand(8))
        self.complex = nn.Parameter(torch.ones(8, dtype=torch.complex64), requires_grad=False)
        self.body = nn.Linear(8, 4)
        self.body.register_buffer("table", torch.ones(1).expand(6))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(self.frozen(x) * self.scale)
        return found


Act = Callable[[esper.Session, Callable[[], None]], None]


def undone_at_once(session: esper.Session, train: Callable[[], None]) -> None:
    session.undo(session.graft("body", "proj_lora_64", rank=2))


def undone_later(session: esper.Session, train: Callable[[], None]) -> None:
    receipt = session.graft("body", "proj_lora_64", rank=2)
    train()
    session.undo(receipt)


def rewound(session: esper.Session, train: Callable[[], None]) -> None:
    session.remedy("rewind")
    train()


def rewound_and_back(session: esper.Session, train: Callable[[], None]) -> None:
    receipt = session.remedy("rewind")
    train()
    session.undo(receipt)


ACTS: tuple[Act, ...] = (undone_at_once, undone_later, rewound, rewound_and_back)


@pytest.mark.parametrize("act", ACTS)
def test_an_act_writes_only_to_what_has_changed(act: Act) -> None:
    model = Reads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    session = esper.attach(model, optimizer, mode="supervised", verbose=False)

    def train() -> None:
        for _ in range(30):
            loss = model(torch.randn(16, 8)).square().mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            session.step(loss)

    train()
    still: list[Any] = [model.frozen.weight, model.frozen.bias, model.complex, model.scale]
    writes = [tensor._version for tensor in still]
    act(session, train)
    train()
    assert [tensor._version for tensor in still] == writes
    session.close()


def test_layers_are_looked_at_without_a_write() -> None:
    model = Reads()
    receipt = esper.graft(model, "body", "proj_lora_64", sample=torch.ones(2, 8), rank=2)
    assert model.scale._version == 0
    receipt.undo()
    assert model.scale._version == 0
