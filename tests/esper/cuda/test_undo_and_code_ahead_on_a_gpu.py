"""On a GPU: a snapshot that went to disk, and a graft whose code was compiled ahead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import esper
from esper.grafting import Snapshot, SnapshotMemory, Surroundings, digest
from tests.esper.cuda.device import needs_device, needs_gpu
from tests.esper.cuda.test_steps_on_a_gpu import Loop

pytestmark = [pytest.mark.cuda, needs_device]


def test_a_snapshot_on_disk_is_restored_to_the_bit(tmp_path: Path) -> None:
    loop, bare = Loop(), Loop()
    options = {"snapshot_memory": 0, "snapshot_folder": tmp_path, "verbose": False}
    with (
        esper.attach(loop.model, loop.optimizer, **options) as session,
        esper.attach(bare.model, bare.optimizer, verbose=False) as other,
    ):
        loop.train(session, 3)
        receipt = session.graft("0", "proj_ia3")
        loop.train(session, 4)
        session._parts.surgery.settle_snapshots(wait=True)
        assert receipt.snapshot_bytes_on_disk
        assert session.undo(receipt).exact
        loop.train(session, 5)
        bare.train(other, 8)
    assert torch.stack(loop.losses[-5:]).tolist() == torch.stack(bare.losses[-5:]).tolist()


@needs_gpu
@pytest.mark.parametrize("reserved", [False, True])
def test_a_snapshot_is_of_its_moment_and_arrives_in_pinned_memory(
    reserved: bool,
) -> None:
    """The steps that follow write to the weights, and use the GPU's memory again."""
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(4))).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x = torch.randn(64, 2048, device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(model(x).square().mean())
        optimizer.step()

    step()
    expected = digest(model)
    memory = SnapshotMemory.reserve(model, (optimizer,)) if reserved else None
    used = torch.cuda.memory_allocated()
    snapshot = Snapshot.take(model, Surroundings((optimizer,)), memory)
    assert torch.cuda.memory_allocated() == used
    frozen = snapshot.freeze(model)
    for _ in range(3):
        step()
    assert all(saved.value.is_pinned() for saved in snapshot.tensors)
    assert frozen.digest == expected
    snapshot.restore()
    assert snapshot.differences() == []
    assert digest(model) == expected


class Wrapped(nn.Module):
    """torch compiles no frame of its own code, so not that of an ``nn.Sequential`` alone."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        return y


@needs_gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_trainer_finds_the_code_of_a_graft_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    loop = Loop()
    loop.model = Wrapped(loop.model)
    session = esper.attach(loop.model, loop.optimizer, mode="supervised", verbose=False)
    loop.model.compile()
    with session:
        loop.train(session, 3)
        while not session.prepare("body.0", "proj_lora_64"):
            loop.train(session, 1)
        forecast = session.forecast_pause("body.0", "proj_lora_64")
        assert forecast is not None
        assert forecast.prepared, forecast
        counters.clear()
        session.graft("body.0", "proj_lora_64")
        loop.train(session, 2)
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
