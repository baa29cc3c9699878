"""D6 in Lightning: checkpoints across a graft give the model that was saved."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.exceptions import ConfigurationError
from esper.grafting.slot import slots
from esper.sdk.frameworks.lightning import EsperCallback

pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
BATCHES, GRAFT_AT, UNDO_AT = 5, 13, 23  # in the third and in the fifth epoch


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch: Any, number: int) -> Tensor:
        return F.cross_entropy(self.body(batch[0]), batch[1])

    def test_step(self, batch: Any, number: int) -> None:
        self.log("test_loss", F.cross_entropy(self.body(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Surgeon(Callback):
    def __init__(self, callback: EsperCallback, blueprint: str, undo: bool) -> None:
        self.callback, self.blueprint, self.undo = callback, blueprint, undo
        self.receipt: Any = None
        self.outputs: dict[int, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        session = self.callback.session
        assert session is not None
        if trainer.global_step == GRAFT_AT and not session.adaptations:
            layer = "body.1" if self.blueprint == "ln_rms" else "body.0"
            self.receipt = session.graft(layer, self.blueprint)
        if trainer.global_step == UNDO_AT and self.undo:
            session.undo(self.receipt, hard=False)
        if trainer.global_step % BATCHES == 0:
            self.outputs[trainer.global_step] = output_of(pl_module)


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * BATCHES, 8, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)


def output_of(net: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = net.body(torch.linspace(-1, 1, 32).reshape(4, 8))
    return y


def fit(
    folder: Path, blueprint: str = "mlp_gelu_2048", *, undo: bool = False, **options: Any
) -> tuple[Net, Trainer, Surgeon]:
    """Six epochs; a checkpoint at the end of each."""
    net, callback = Net(), EsperCallback(run="fit")
    surgeon = Surgeon(callback, blueprint, undo)
    saving = ModelCheckpoint(
        dirpath=folder, filename="{step}", every_n_epochs=1, save_top_k=-1, **options
    )
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=6, callbacks=[callback, surgeon, saving],
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(net, data())
    return net, trainer, surgeon


CASES = [
    ("before the graft", 10, False),
    ("with the graft", 20, False),
    ("with a graft that was undone since", 20, True),
    ("after the undo", 30, True),
]


@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights only"])
@pytest.mark.parametrize("blueprint", ["mlp_gelu_2048", "proj_lora_64", "ln_rms"])
@pytest.mark.parametrize(("step", "undo"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_the_best_checkpoint_is_tested_and_loaded_to_the_bit(
    tmp_path: Path, step: int, undo: bool, blueprint: str, weights_only: bool
) -> None:
    net, trainer, surgeon = fit(tmp_path, blueprint, undo=undo, save_weights_only=weights_only)
    path = str(tmp_path / f"step={step}.ckpt")
    expected = surgeon.outputs[step]

    trainer.test(net, data(), ckpt_path=path, verbose=False)
    assert torch.equal(output_of(net), expected)
    assert torch.equal(output_of(Net.load_from_checkpoint(path)), expected)
    fresh = Net()
    esper.load_state_dict(fresh, torch.load(path, weights_only=True)["state_dict"])
    assert torch.equal(output_of(fresh), expected)


@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights only"])
def test_a_fit_goes_on_from_a_checkpoint_with_a_graft(tmp_path: Path, weights_only: bool) -> None:
    _, _, surgeon = fit(tmp_path, save_weights_only=weights_only)
    net, callback = Net(), EsperCallback(run="later")
    seen = []

    class First(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(output_of(pl_module))

    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=6, callbacks=[callback, First()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    path = tmp_path / "step=20.ckpt"
    if weights_only:  # Lightning itself goes on from a whole checkpoint alone
        net.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        assert torch.equal(output_of(net), surgeon.outputs[20])
        return
    trainer.fit(net, data(), ckpt_path=path)
    assert torch.equal(seen[0], surgeon.outputs[20])
    assert [layer for layer, _, slot in slots(net) if slot.grafts()] == ["body.0"]
    assert torch.equal(output_of(net), surgeon.outputs[30])


def test_a_fit_without_the_callback_says_how_to_go_on_from_a_graft(tmp_path: Path) -> None:
    """Lightning would find the graft's weights in the optimizer, and name a size of a group."""
    fit(tmp_path)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=6, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="EsperCallback"):
        trainer.fit(Net(), data(), ckpt_path=tmp_path / "step=20.ckpt")


def test_a_module_that_is_fitted_again_from_an_older_checkpoint_loses_the_graft_first(
    tmp_path: Path,
) -> None:
    net, _, surgeon = fit(tmp_path)
    again = Surgeon(EsperCallback(run="again"), "mlp_gelu_2048", undo=False)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=6, callbacks=[again.callback, again], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(net, data(), ckpt_path=tmp_path / "step=10.ckpt")
    assert torch.equal(again.outputs[30], surgeon.outputs[30])
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=6, callbacks=[again.callback, again], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(net, data(), ckpt_path=tmp_path / "step=20.ckpt")
    assert torch.equal(output_of(net), surgeon.outputs[30])


def test_without_esper_lightning_names_what_to_call(tmp_path: Path) -> None:
    fit(tmp_path)
    state = torch.load(tmp_path / "step=20.ckpt", weights_only=True)["state_dict"]
    with pytest.raises(RuntimeError, match="load_with_esper_load_state_dict"):
        nn.Module.load_state_dict(Net(), state)


def test_a_module_without_grafts_is_loaded_as_before(tmp_path: Path) -> None:
    net = Net()
    assert Net().load_state_dict(net.state_dict()).missing_keys == []
    with pytest.raises(RuntimeError, match="Missing key"):
        Net().load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Net().load_state_dict({**net.state_dict(), "nowhere": torch.ones(1)})
