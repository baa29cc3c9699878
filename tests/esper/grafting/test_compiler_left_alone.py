"""A graft in a process that compiled nothing leaves torch's compiler alone.

On a machine with a GPU a reset of the compiler imports Inductor, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import esper

Act = Callable[[nn.Module, torch.optim.Optimizer, torch.Tensor], object]
ACTS: dict[str, Act] = {
    "graft": lambda model, optimizer, x: esper.graft(
        model, "0", "proj_lora_64", optimizer=optimizer, sample=x
    ),
    "span": lambda model, optimizer, x: esper.graft(
        model, "2", "widen_hidden", since="0", optimizer=optimizer, sample=x
    ),
    "undo": lambda model, optimizer, x: esper.graft(
        model, "0", "proj_ia3", optimizer=optimizer, sample=x
    ).undo(),
}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("act", ACTS)
def test_it_is_reset_only_where_something_was_compiled(
    act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resets: list[bool] = []
    x = torch.randn(4, 8)
    for compiled in (False, True):
        if compiled:
            torch.compile(nn.Linear(2, 2), backend="eager")(torch.randn(1, 2))
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        optimizer = torch.optim.AdamW(model.parameters())
        torch.autograd.backward(model(x).sum())
        optimizer.step()
        with monkeypatch.context() as patched:
            patched.setattr(torch.compiler, "reset", lambda: resets.append(True))
            ACTS[act](model, optimizer, x)

        assert bool(resets) == compiled
