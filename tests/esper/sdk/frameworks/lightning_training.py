"""A Lightning fit with accumulation, bf16, a schedule and a graft in its middle.

python -m tests.esper.sdk.frameworks.lightning_training FOLDER

resumes FOLDER's checkpoint and prints a digest.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from esper.grafting import digest
from esper.sdk.frameworks.lightning import EsperCallback

GRAFT_AT, SAVE_AT, STEPS = 8, 14, 24
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


class Net(LightningModule):
    """No dropout: Lightning leaves the random streams of a resumed fit to its user.

    Nor does it find the place in the data again: the checkpoint is written at an epoch's end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 16),
            nn.ReLU(), nn.Linear(16, 4),
        )  # fmt: skip
        self.losses: list[float] = []
        self.fail_at = -1

    def training_step(self, batch: Any, number: int) -> Tensor:
        if self.global_step == self.fail_at:
            raise ZeroDivisionError("the data ended")
        x, y = batch
        loss = F.cross_entropy(self.body(x), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, number: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.body(x), y))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.01 * step))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class GraftInTheMiddle(Callback):
    """Comes after Esper's, and grafts by hand: into the later layer first."""

    def __init__(self, esper: EsperCallback) -> None:
        self.esper = esper
        self.counted = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        session = self.esper.session
        assert session is not None
        if trainer.global_step == GRAFT_AT and len(session.adaptations) < 2:
            session.graft("body.3", "proj_lora_64")
            session.graft("body.1", "ln_rms")


def loader(rows: int, seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 8, generator=generator)
    y = (x @ torch.randn(8, 4, generator=torch.Generator().manual_seed(3))).argmax(1)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def fit(
    folder: Path, *, resume: Path | None = None, esper: EsperCallback | None = None, **changes: Any
) -> tuple[Net, EsperCallback, Trainer]:
    torch.manual_seed(0)
    net = Net()
    net.fail_at = changes.pop("fail_at", -1)
    callback = esper or EsperCallback(run="fit")
    checkpoints = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=SAVE_AT,
                             save_top_k=-1)  # fmt: skip
    given = {
        "max_steps": STEPS,
        "accumulate_grad_batches": 2,
        "precision": "bf16-mixed",
        "val_check_interval": 20,
        **changes,
    }
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[callback, GraftInTheMiddle(callback), checkpoints],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **given,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning|torch.utils.data")
        trainer.fit(
            net, loader(16 * SAVE_AT, 1), loader(32, 2), ckpt_path=resume, weights_only=True
        )
    return net, callback, trainer


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    net, callback, _ = fit(folder / "again", resume=folder / f"step={SAVE_AT}.ckpt")
    session = callback.session
    assert session is not None
    names = [entry.blueprint for entry in session.adaptations]
    sys.stdout.write(f"{names} {digest(net)}\n")
