"""What Esper's other threads may touch while the model trains.

The backward pass and the optimizer work without Python's lock. A thread that reads ``grad`` at the
same moment corrupts memory: the interpreter crashes some time later, anywhere.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.grafting.snapshots.snapshot import SnapshotMemory

ROOT = Path(__file__).parents[3]
BESIDE_THE_TRAINING = """
import threading
import torch
from torch import nn
from esper.grafting.snapshots.snapshot import SnapshotMemory

torch.set_num_threads(1)
model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(30)])
optimizer = torch.optim.AdamW(model.parameters())
trained = threading.Event()

def reserve():
    while not trained.is_set():
        SnapshotMemory.reserve(model, [optimizer])

thread = threading.Thread(target=reserve)
thread.start()
for _ in range(300):
    model(torch.randn(8, 64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
trained.set()
thread.join()
"""


class Watched(nn.Parameter):
    """Counts who reads its gradient."""

    reads = 0

    @property
    def grad(self) -> Any:
        Watched.reads += 1
        return torch.ones_like(self.data)


def test_memory_is_reserved_without_reading_a_gradient() -> None:
    model = nn.Linear(64, 64)
    model.weight = Watched(model.weight.detach())
    Watched.reads = 0

    memory = SnapshotMemory.reserve(model, [torch.optim.SGD(model.parameters())])

    assert Watched.reads == 0
    (places,) = memory._free.values()
    assert len(places) == 2  # the weight and its gradient


def test_a_model_trains_while_memory_is_reserved_in_another_thread() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BESIDE_THE_TRAINING],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_program_may_end_while_digests_are_computed() -> None:
    """Python ends threads by force; one that is inside torch then would abort the program."""
    program = (
        "from torch import nn\n"
        "from esper.grafting.tensors.digests import Frozen, hash_in_background\n"
        "model = nn.Sequential(*[nn.Linear(500, 500) for _ in range(60)])\n"
        "for _ in range(20):\n"
        "    hash_in_background(Frozen.of(model))\n"
    )
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program], capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr


ENDS: dict[str, Callable[[Any, Any], object]] = {
    "undo": lambda session, receipt: session.undo(receipt),
    "detach": lambda session, receipt: session.detach(),
    "close": lambda session, receipt: session.close(),
}


@pytest.mark.parametrize(
    ("end", "steps"), [("undo", 25), ("detach", 0), ("detach", 25), ("close", 0)]
)
def test_a_pass_that_has_begun_ends_as_ever_when_hooks_are_taken_out(end: str, steps: int) -> None:
    """torch reads a layer's hooks before it runs them, as a pass in another thread may do just now.

    It then calls those that are gone without their keyword arguments.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    session = esper.attach(model, optimizer, run="threads", mode="supervised", verbose=False)
    acts: list[Callable[[], object]] = []

    def act(*_: object) -> None:
        while acts:
            acts.pop()()

    model[0].register_forward_hook(act, prepend=True)

    def train() -> None:
        loss = (model(torch.randn(8, 8)) - 1.0).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss)

    for _ in range(steps):
        train()
    receipt = session.graft("0", "proj_lora_64", rank=2) if steps else None
    acts.append(lambda: ENDS[end](session, receipt))
    with torch.no_grad():
        model(torch.randn(8, 8))
    assert not acts
    for _ in range(5 * (end != "close")):
        train()

    assert not [found for found in session.findings() if found.severity == "serious"]
