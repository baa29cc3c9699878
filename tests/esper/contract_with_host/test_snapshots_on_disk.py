"""D9: snapshots that do not fit in memory go to disk, and nothing is left of them there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import esper
from esper import Session
from esper.contracts import Finding, ViolationRule
from esper.exceptions import ConfigurationError, IncompatibleLayerError
from esper.grafting.snapshots import spilling
from esper.grafting.tensors.saved_values import same_bits
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

    def troubles(self) -> list[Finding]:
        """Findings about memory; the diagnosis may have others."""
        return [f for f in self.session.findings() if f.rule == ViolationRule.MEMORY]

    def wait_for_disk(self) -> None:
        self.session._parts.surgery.settle_snapshots(wait=True)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No file is complete until it is set."""
    opened, compare = threading.Event(), spilling.same_bits

    def wait(*tensors: torch.Tensor) -> bool:
        assert opened.wait(600)
        return compare(*tensors)

    monkeypatch.setattr(spilling, "same_bits", wait)
    yield opened
    opened.set()


def test_a_snapshot_on_disk_is_restored_to_the_bit_and_leaves_nothing(tmp_path: Path) -> None:
    run, bare = Run(tmp_path / "snapshots"), Run(None)
    receipts = []
    for layer in LAYERS:
        receipts.append(run.session.graft(layer, "proj_ia3"))
        run.train()
    assert [r.can_undo_hard for r in receipts] == [False, True, True, True]
    run.wait_for_disk()
    last = receipts[-1]
    assert last.snapshot_bytes_on_disk > last.snapshot_bytes
    assert "its snapshot is on disk" in str(last)
    assert f"MiB in {tmp_path}" in str(run.session)
    assert not run.troubles()
    assert not list((tmp_path / "snapshots").iterdir()), "files without a name"
    assert run.session.undo(receipts[2]).exact
    assert run.session.undo(receipts[1]).exact
    run.session.undo(receipts[0], hard=False)
    other = Run(tmp_path)
    receipt = other.session.graft("2", "proj_ia3")
    other.train(4)
    assert other.session.undo(receipt).exact
    assert other.train(5) == bare.train(5)


def test_training_goes_on_while_a_snapshot_is_written(
    tmp_path: Path, gate: threading.Event
) -> None:
    run = Run(tmp_path)
    receipt = run.session.graft("1", "proj_ia3")
    run.train(3)
    assert receipt.is_being_written
    assert "is being written to disk" in str(receipt)
    assert not receipt.snapshot_bytes_on_disk
    assert not list(tmp_path.iterdir()), "the file has no name, so a crash leaves nothing"
    gate.set()
    run.wait_for_disk()
    assert receipt.snapshot_bytes_on_disk
    assert not receipt.snapshot_bytes
    assert not run.troubles()


def test_an_undo_needs_no_file_while_it_is_written(tmp_path: Path, gate: threading.Event) -> None:
    run, bare = Run(tmp_path), Run(None)
    receipt = run.session.graft("1", "proj_ia3")
    run.train(3)
    assert run.session.undo(receipt).exact
    gate.set()
    assert run.train(5) == bare.train(5)
    assert not run.troubles()


def test_what_the_script_loads_while_it_is_written_is_kept(
    tmp_path: Path, gate: threading.Event
) -> None:
    run = Run(tmp_path)
    receipt = run.session.graft("1", "proj_ia3")
    weight = torch.ones_like(run.model.get_parameter("0.weight"))
    run.model.load_state_dict({"0.weight": weight}, strict=False)
    gate.set()
    run.wait_for_disk()
    run.train()
    assert run.session.undo(receipt).kept
    assert torch.equal(run.model.get_parameter("0.weight"), weight)


@pytest.mark.parametrize("act", ["graft", "remedy"])
def test_one_copy_at_most_waits_for_the_disk(
    act: str, tmp_path: Path, gate: threading.Event
) -> None:
    run = Run(tmp_path)
    first = run.session.graft("1", "proj_ia3")
    threading.Timer(0.2, gate.set).start()
    if act == "graft":
        run.session.graft("2", "proj_ia3")
    else:
        run.session.remedy("set_lr", "2", factor=0.5)
    assert not first.is_being_written
    assert first.snapshot_bytes_on_disk


def test_every_kind_of_tensor_comes_back_in_its_form(tmp_path: Path) -> None:
    image = torch.randn(2, 3, 4, 5)
    values = [
        image,
        image.to(memory_format=torch.channels_last),
        image.transpose(1, 3).clone(),
        image.bfloat16(),
        image.double() * torch.nan,
        torch.view_as_complex(torch.randn(3, 2)),
        image > 0,
        torch.tensor(7),
        torch.randn(5, 1).expand(5, 3),
    ]
    for value, read in zip(values, spilling._on_disk(values, tmp_path, bool), strict=True):
        assert (read.dtype, read.shape) == (value.dtype, value.shape)
        assert same_bits(read, value)
        assert read.stride() == value.stride() or 0 in value.stride()


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

    monkeypatch.setattr(spilling.tempfile, "TemporaryFile", full)
    receipt = run.session.graft("0", "proj_ia3")
    run.wait_for_disk()
    run.train()
    assert not receipt.can_undo_hard
    (found,) = run.troubles()
    assert "on disk: " in found.observed
    assert not list(tmp_path.iterdir())
    run.session.undo(receipt, hard=False)


def test_other_bytes_than_were_written_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    monkeypatch.setattr(spilling, "same_bits", lambda *_: False)
    receipt = run.session.graft("0", "proj_ia3")
    run.wait_for_disk()
    assert not receipt.can_undo_hard
    assert "other bytes" in run.troubles()[0].observed


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
