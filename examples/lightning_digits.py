"""Lightning on scikit-learn's handwritten digits, watched by Esper.

python examples/lightning_digits.py --steps 400
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from esper.sdk.lightning import EsperCallback


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.body(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self.body(images), labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()

    torch.manual_seed(0)
    data = load_digits()
    rows = TensorDataset(torch.tensor(data.data).float() / 16, torch.tensor(data.target))
    train = DataLoader(torch.utils.data.Subset(rows, range(1437)), batch_size=64, shuffle=True)
    held = DataLoader(torch.utils.data.Subset(rows, range(1437, len(rows))), batch_size=360)
    esper = EsperCallback(run="lightning-digits", mode="automatic")
    trainer = Trainer(
        max_steps=args.steps,
        accelerator="auto",
        devices=1,
        accumulate_grad_batches=2,
        callbacks=[esper],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Digits(), train, held)
    print(f"val_loss {trainer.callback_metrics['val_loss'].item():.3f}")
    for adaptation in esper.session.adaptations if esper.session else ():
        print(f"{adaptation.blueprint} at {adaptation.layer}: {adaptation.state}")


if __name__ == "__main__":
    main()
