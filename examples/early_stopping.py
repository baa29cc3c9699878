"""Early stopping on scikit-learn's handwritten digits, with a scheduler and a graft half-way.

The script keeps the best weights as every tutorial does, and loads them at the end. It tells Esper
nothing of its scheduler or of the weights that it keeps. Whether the best state is older or younger
than the graft, it comes back as it was.

python examples/early_stopping.py --epochs 40
"""

from __future__ import annotations

import argparse
import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import esper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--graft-at", type=int, default=10, help="epoch of the graft; 0: none")
    parser.add_argument("--patience", type=int, default=8)
    args = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    train_x, train_y = images[:1200], labels[:1200]
    valid_x, valid_y = images[1200:], labels[1200:]

    model = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-2, total_steps=args.epochs * 19
    )
    session = esper.attach(model, optimizer, run="early-stopping")

    best_loss, best_state, best_epoch = float("inf"), copy.deepcopy(model.state_dict()), 0
    for epoch in range(1, args.epochs + 1):
        model.train()
        for rows in torch.randperm(len(train_x)).split(64):
            loss = F.cross_entropy(model(train_x[rows]), train_y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            session.step(loss)

        if epoch == args.graft_at:
            print(session.graft("0", "proj_lora_64"))

        model.eval()
        with torch.no_grad():
            valid_loss = F.cross_entropy(model(valid_x), valid_y).item()
        if valid_loss < best_loss:
            best_loss, best_epoch = valid_loss, epoch
            best_state = copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= args.patience:
            print(f"no better since epoch {best_epoch}: stopping after epoch {epoch}")
            break

    model.load_state_dict(best_state)
    model.eval()
    with torch.no_grad():
        output = model(valid_x)
    print(f"best epoch {best_epoch}, validation loss {best_loss:.6f}")
    print(f"loaded again: validation loss {F.cross_entropy(output, valid_y).item():.6f}")
    print(f"accuracy {(output.argmax(1) == valid_y).float().mean().item():.3f}")
    session.close()


if __name__ == "__main__":
    main()
