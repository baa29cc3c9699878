"""A loop that Accelerate runs, on scikit-learn's handwritten digits, watched by Esper.

python examples/accelerate_digits.py --steps 400
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from esper.sdk.accelerate import attach, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()

    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    data = load_digits()
    rows = TensorDataset(torch.tensor(data.data).float() / 16, torch.tensor(data.target))
    net = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    loader = DataLoader(rows, batch_size=64, shuffle=True)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)

    with attach(
        accelerator, model, optimizer, run="accelerate-digits", mode="automatic"
    ) as session:
        done = 0
        while done < args.steps:
            for images, labels in loader:
                with accelerator.accumulate(model):
                    loss = F.cross_entropy(model(images), labels)
                    accelerator.backward(loss)
                    optimizer.step()
                    step(session, accelerator, loss)
                    optimizer.zero_grad()
                done += accelerator.sync_gradients
        print(f"loss {loss.item():.3f} after {done} steps")
        for adaptation in session.adaptations:
            print(f"{adaptation.blueprint} at {adaptation.layer}: {adaptation.state}")


if __name__ == "__main__":
    main()
