"""What the README shows runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_two_lines_watch_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESPER_SERVER", raising=False)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    attach, step = SNIPPETS[0].split("...\n")
    world = {"model": model, "optimizer": optimizer}
    exec(attach, world)
    for _ in range(3):
        loss = model(torch.ones(2, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        exec(step, world | {"loss": loss})
    session = world["session"]
    assert [layer.kind for layer in session.layers] == ["Linear"]  # type: ignore[attr-defined]
    session.close()  # type: ignore[attr-defined]


def test_a_graft_by_hand_preserves_the_function_and_goes_out_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.encoder = nn.Sequential()
    model.encoder.fc1 = nn.Linear(16, 16)
    batch = torch.randn(4, 16)
    before = model(batch)
    graft, look, undo = SNIPPETS[1].splitlines()
    world = {"model": model, "batch": batch, "optimizer": torch.optim.AdamW(model.parameters())}
    exec(f"import esper\n{graft}", world)
    assert eval(look.split("#")[0], world) == 0.0
    exec(undo, world)
    assert torch.equal(model(batch), before)
