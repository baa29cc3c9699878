"""D9: snapshots that do not fit in memory go to disk, and nothing is left of them there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import esper
from esper import Session
from esper.exceptions import ConfigurationError, IncompatibleLayerError
from esper.grafting import spilling
from esper.sdk import snapshot_limit

LAYERS = ("0", "1", "2", "3")


class Run:
    """Four layers whose tensors are large enough to be worth a file."""

    def __init__(self, folder: Path | None, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential()
        for layer in LAYERS:
            self.model.add_module(layer, nn.Linear(40, 40))
            self.model.add_module(f"after_{layer}", nn.Tanh())
        self.model.to(torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)
        self.session: Session = esper.attach(
            self.model,
            self.optimizer,
            snapshot_memory=0,
            snapshot_folder=folder,
            verbose=False,
            **options,
        )
        self.x = torch.randn(8, 40, dtype=torch.bfloat16)
        self.train(3)

    def train(self, steps: int = 1) -> list[float]:
        losses = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = F.mse_loss(self.model(self.x), self.x)
            torch.autograd.backward(loss)
            self.optimizer.step()
            self.session.step(loss)
            losses.append(loss.item())
        return losses


def test_a_snapshot_on_disk_is_restored_to_the_bit_and_leaves_nothing(tmp_path: Path) -> None:
    run, bare = Run(tmp_path / "snapshots"), Run(None)
    receipts = []
    for layer in LAYERS:
        receipts.append(run.session.graft(layer, "proj_ia3"))
        run.train()
    assert [r.can_undo_hard for r in receipts] == [False, True, True, True]
    last = receipts[-1]
    assert last.snapshot_bytes_on_disk > last.snapshot_bytes
    assert "its snapshot is on disk" in str(last)
    assert f"MiB in {tmp_path}" in str(run.session)
    assert not run.session.findings()
    assert not list((tmp_path / "snapshots").iterdir()), "files without a name"
    assert run.session.undo(receipts[2]).exact
    assert run.session.undo(receipts[1]).exact
    run.session.undo(receipts[0], hard=False)
    other = Run(tmp_path)
    receipt = other.session.graft("2", "proj_ia3")
    other.train(4)
    assert other.session.undo(receipt).exact
    assert other.train(5) == bare.train(5)


def test_a_full_disk_refuses_the_graft_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    monkeypatch.setattr(spilling, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(IncompatibleLayerError, match="MiB free: free some"):
        run.session.graft("0", "proj_ia3")
    run.train()
    assert run.session.adaptations == ()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write")])
def test_a_disk_that_fills_up_meanwhile_leaves_a_soft_undo(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(spilling.torch, "save", full)
    receipt = run.session.graft("0", "proj_ia3")
    run.train()
    assert not receipt.can_undo_hard
    (found,) = run.session.findings()
    assert "on disk: " in found.observed
    assert not list(tmp_path.iterdir())
    run.session.undo(receipt, hard=False)


def test_other_bytes_than_were_written_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    monkeypatch.setattr(spilling, "same_bits", lambda *_: False)
    receipt = run.session.graft("0", "proj_ia3")
    assert not receipt.can_undo_hard
    assert "other bytes" in run.session.findings()[0].observed


def test_the_folder_comes_from_the_argument_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(snapshot_limit.FOLDER_VARIABLE, str(tmp_path / "env"))
    assert snapshot_limit.folder_for_snapshots(None) == tmp_path / "env"
    assert snapshot_limit.folder_for_snapshots(tmp_path / "mine") == tmp_path / "mine"
    assert (tmp_path / "mine").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="folder for snapshots cannot be made"):
        snapshot_limit.folder_for_snapshots(tmp_path / "file")
