"""A small convolutional net on scikit-learn's handwritten digits, watched by Esper.

    python examples/digits_cnn.py --steps 10000

Two units stand between the convolutions and the ten digits. That is too few: the loss stops
falling early, and there is something to adapt. With ``--units 32`` there is nothing to adapt.
Killed and started again, the script goes on from its last checkpoint, grafts included.
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

RATE = 5e-3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images [1437, 1, 16, 16] and labels, then 360 held-out ones."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=16, mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(data.target)[order]
    held = images[1437:].to(DEVICE), labels[1437:].to(DEVICE)
    return images[:1437], labels[:1437], *held


def batch(images: Tensor, labels: Tensor, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """384 digits, each turned and shifted a little; the same for a step whenever asked for."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    rows = torch.randint(len(images), (384,), generator=generator)
    turn, *shift = (0.6 * torch.rand(3, 384, generator=generator) - 0.3).unbind()
    cos, sin = turn.cos(), turn.sin()
    maps = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(maps, [384, 1, 16, 16], align_corners=False)
    picked = F.grid_sample(images[rows], grid, align_corners=False)
    return picked.to(DEVICE), labels[rows].to(DEVICE)


def build(units: int) -> nn.Sequential:
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(1, 4, 3, padding=1)), ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(4, 4, 3, padding=1)), ("relu2", nn.ReLU()), ("pool2", nn.MaxPool2d(2)),
        ("conv3", nn.Conv2d(4, 4, 3, padding=1)), ("relu3", nn.ReLU()), ("pool3", nn.MaxPool2d(2)),
        ("flat", nn.Flatten()), ("squeeze", nn.Linear(64, units)), ("tanh", nn.Tanh()),
        ("head", nn.Linear(units, 10)),
    ]  # fmt: skip
    return nn.Sequential(OrderedDict(layers))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", default="digits-cnn")
    parser.add_argument("--units", type=int, default=2, help="between convolutions and digits")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to wait in each step")
    parser.add_argument("--forever", action="store_true", help="begin anew with the next seed")
    folder = Path(os.environ.get("ESPER_DATA_DIR", "."))
    parser.add_argument("--lr", type=float, default=RATE, help="learning rate")
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--states", type=Path, help="keep states here that a branch begins from")
    parser.add_argument("--from", dest="state", type=Path, help="begin from this state")
    parser.add_argument("--checkpoint", type=Path, default=folder / "digits_cnn.pt")
    return parser.parse_args()


def train(args: argparse.Namespace, seed: int, saved: dict[str, Any] | None) -> None:
    """One run, from a checkpoint where there is one. Raises ``RunStopped``."""
    torch.manual_seed(seed)
    images, labels, held_images, held_labels = digits()
    model = build(args.units).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    def evaluate() -> float:
        return F.cross_entropy(model(held_images), held_labels).item()

    done = 0 if saved is None else saved["step"]

    def write(path: Path) -> str:
        state = {
            "seed": seed,
            "lr": args.lr,
            "step": done,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "session": session.state_dict(),
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)  # a kill leaves the old one or the new one, whole
        return str(path)

    def keep() -> str:
        """A person asks for a checkpoint: it stays until its folder is removed."""
        return write(args.states / f"kept-{done}.pt")

    session = esper.attach(
        model, optimizer, run=args.run, mode="automatic",
        evaluate=evaluate, target_steps=args.steps, checkpoint=keep if args.states else None,
    )  # fmt: skip
    if saved is not None:
        session.load_state_dict(saved["session"])  # first: it rebuilds what was grafted
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if args.lr != saved.get("lr", args.lr):  # a branch with another rate
            for group in optimizer.param_groups:
                group["lr"] = args.lr

    with session:
        for step in range(done, args.steps):
            x, target = batch(images, labels, step, seed)
            logits = model(x)
            loss = F.cross_entropy(logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.report(accuracy=(logits.argmax(1) == target).float().mean().item())
            done = step + 1
            session.step(loss)
            if done % args.every == 0:
                write(args.checkpoint)
                if args.states:
                    keep_newest(args.checkpoint, args.states / f"step-{done}.pt")
                print(f"step {done}  loss {loss.item():.3f}", flush=True)
            time.sleep(args.pause)


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    seed, saved = args.seed, None
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint, weights_only=True)
        seed = saved["seed"]
    elif args.state:  # a branch may have another seed
        saved = torch.load(args.state, weights_only=True)
    try:
        train(args, seed, saved)
        while args.forever:
            seed += 1
            train(args, seed, None)
    except RunStopped as stopped:
        print(f"stopped: {stopped}", flush=True)
    args.checkpoint.unlink(missing_ok=True)


def keep_newest(checkpoint: Path, state: Path) -> None:
    """The checkpoint under a name with its step too; the three newest of these stay."""
    state.unlink(missing_ok=True)
    os.link(checkpoint, state)
    states = sorted(state.parent.glob("step-*.pt"), key=lambda path: path.stat().st_mtime)
    for old in states[:-3]:
        old.unlink()


if __name__ == "__main__":
    main()
