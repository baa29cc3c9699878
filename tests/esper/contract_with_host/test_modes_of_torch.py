"""D1 to D3 where the script runs its model under a mode of torch that sees each operation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import esper
from esper import Session
from tests.esper.contract_with_host.failed_parts import failed_parts

Mode = Callable[[], Any]


class Block(nn.Module):
    """It takes means itself, as a look at its layers does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.outer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.inner(x))
        h = (h - h.mean(-1, keepdim=True)).abs()
        found: Tensor = self.outer(h / (h.square().mean() + 1).sqrt()).mean(0, keepdim=True) + x
        return found


class Checkpointed(nn.Sequential):
    """Selective activation checkpointing: the results of all operations are kept."""

    def forward(self, x: Tensor) -> Tensor:
        def keep(*_: Any, **__: Any) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE

        context = partial(create_selective_checkpoint_contexts, keep)
        for block in self:
            x = checkpoint(block, x, use_reentrant=False, context_fn=context)
        return x


class Counting(TorchDispatchMode):
    """Counts the operations of the script, as tools that find its memory or its cost do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class CountingCalls(TorchFunctionMode):
    """The same, of the functions that the script calls."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def run(model: nn.Module, mode: str, steps: int, around: Mode = nullcontext) -> Any:
    """Gradients' norm and the mode's count, of each step, and the session."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    session: Session | None = None
    if mode:
        options: dict[str, Any] = {"run": "modes", "mode": mode, "verbose": False}
        options["sampling"] = [(0, 1, 1)]  # all of each step
        session = esper.attach(model, optimizer, **options)
    x, seen = torch.randn(4, 8), []
    for _ in range(steps):
        with around() as entered:
            loss: Tensor = model(x).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
        seen.append((norms, getattr(entered, "count", 0)))
        optimizer.step()
        if session is not None:
            session.step(loss)
    return seen, session


MODELS: dict[str, tuple[Callable[[], nn.Module], Mode]] = {
    "selective checkpoints": (lambda: Checkpointed(Block(), Block()), nullcontext),
    "a counter of operations": (lambda: nn.Sequential(Block(), Block()), Counting),
    "a counter of calls": (lambda: nn.Sequential(Block(), Block()), CountingCalls),
}


@pytest.mark.parametrize("mode", ["observe", "supervised"])
@pytest.mark.parametrize("kind", MODELS)
def test_no_mode_of_the_script_sees_that_esper_looks(kind: str, mode: str) -> None:
    """The shifted results of a selective checkpoint would be other gradients, or an error."""
    make, around = MODELS[kind]
    runs = []
    for watched in ("", mode):
        torch.manual_seed(0)
        runs.append(run(make(), watched, 12, around))
    (bare, _), (seen, session) = runs

    assert seen == bare
    assert not failed_parts(session)
    frame = session.frame()
    assert frame is not None
    assert frame.value("0.inner", "act_std") > 0
    assert all(layer.in_shape for layer in session.layers)


@pytest.mark.parametrize("when", ["before the first step", "armed"])
def test_a_pass_without_numbers_is_not_looked_at(when: str) -> None:
    """As some scripts do to find how much memory a batch would take."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    _, session = run(model, "observe", 0 if when == "before the first step" else 6)
    if when == "armed":
        session._parts.surgery.sampler._activations.arm()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        model(fake.from_tensor(torch.ones(3, 8)))

    assert len(session.layers) == 2
    optimizer = session._parts.setup.surroundings.optimizers[0]
    for _ in range(20):
        loss = model(torch.ones(4, 8)).square().mean()
        loss.backward()
        optimizer.step()
        session.step(loss)
    assert session.layers[0].in_shape == (4, 8)
    assert not failed_parts(session)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("when", ["before the first step", "armed"])
@pytest.mark.parametrize("use", ["script", "trace"])
def test_torchscript_takes_the_model_in_every_moment(use: str, when: str) -> None:
    """As TensorBoard's ``add_graph`` does before a training, and checkpoints within one do."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    _, session = run(model, "observe", 0 if when == "before the first step" else 6)
    if when == "armed":
        session._parts.surgery.sampler._activations.arm()
    assert any(module._forward_hooks for module in model.modules())

    x = torch.ones(2, 8)
    graph = torch.jit.script(model) if use == "script" else torch.jit.trace(model, x)

    assert torch.equal(graph(x), model(x))
    session.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_loaded_first_draws_no_random_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripts set their seed and attach later, and rich draws a number when it is loaded."""
    import random

    (tmp_path / "draws_when_loaded.py").write_text("import random\nvalue = random.random()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(esper._HOMES, "value", "draws_when_loaded")
    before = random.getstate()

    assert esper.value
    assert random.getstate() == before
    del sys.modules["draws_when_loaded"]
