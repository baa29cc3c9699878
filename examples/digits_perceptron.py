"""A perceptron on scikit-learn's handwritten digits, watched by Esper.

    python examples/digits_perceptron.py --hidden 3

Three hidden units are too few for ten digits: training and held-out loss stop falling together.
Esper names the layer that is too narrow, and proposes to widen it. Killed and started again, the
script goes on from its last checkpoint, grafts included.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.sdk import RunStopped

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TO_TRAIN = 1_200


def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 64] and labels, in a random order that is always the same."""
    data = load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    return images[order].to(DEVICE), torch.tensor(data.target)[order].to(DEVICE)


def build(hidden: int) -> nn.Sequential:
    layers = OrderedDict(fc1=nn.Linear(64, hidden), relu=nn.ReLU(), fc2=nn.Linear(hidden, 10))
    return nn.Sequential(layers)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", default="digits-perceptron")
    parser.add_argument("--hidden", type=int, default=3, help="units between image and digits")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to wait in each step")
    parser.add_argument("--forever", action="store_true", help="begin anew with the next seed")
    folder = Path(os.environ.get("ESPER_DATA_DIR", "."))
    parser.add_argument("--checkpoint", type=Path, default=folder / "digits_perceptron.pt")
    return parser.parse_args()


def train(args: argparse.Namespace, seed: int, saved: dict[str, Any] | None) -> None:
    """One run, from a checkpoint where there is one. Raises ``RunStopped``."""
    torch.manual_seed(seed)
    images, labels = digits()
    model = build(args.hidden).to(DEVICE)
    # Without weight decay, the widened model would learn the training images by heart.
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)

    def evaluate() -> float:
        return F.cross_entropy(model(images[TO_TRAIN:]), labels[TO_TRAIN:]).item()

    session = esper.attach(
        model, optimizer, run=args.run, mode="supervised",
        evaluate=evaluate, target_steps=args.steps,
    )  # fmt: skip
    start = 0
    if saved is not None:
        session.load_state_dict(saved["session"])  # first: it rebuilds what was grafted
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]

    with session:
        for step in range(start, args.steps):
            rows = torch.randint(TO_TRAIN, (32,), device=DEVICE)
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.step(loss)
            if step % 1_000 == 999:
                save(args.checkpoint, seed, step + 1, model, optimizer, session)
                print(f"step {step + 1}  loss {loss.item():.3f}", flush=True)
            time.sleep(args.pause)


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    saved = torch.load(args.checkpoint, weights_only=True) if args.checkpoint.exists() else None
    seed = saved["seed"] if saved is not None else args.seed
    try:
        train(args, seed, saved)
        while args.forever:
            seed += 1
            train(args, seed, None)
    except RunStopped as stopped:
        print(f"stopped: {stopped}", flush=True)
    args.checkpoint.unlink(missing_ok=True)


def save(
    path: Path,
    seed: int,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    session: esper.Session,
) -> None:
    state = {
        "seed": seed,
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "session": session.state_dict(),
    }
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)  # a kill leaves the old one or the new one, whole


if __name__ == "__main__":
    main()
