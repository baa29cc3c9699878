"""A byte-level transformer on the text of Python's own help topics, watched by Esper.

    python examples/topics_lm.py --steps 10000 --rate-jump-at 1500

With ``--rate-jump-at`` its schedule has a fault: from that step the learning rate is three hundred
times too high. Esper names the step and the cause, and proposes to return to before it. Killed and
started again, the script goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.sdk import RunStopped

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONTEXT = 48
WIDTH = 16
RATE = 3e-3
JUMP = 300  # with 100 the loss comes back by itself after some minutes


class TinyTransformer(nn.Module):
    """Two causal blocks over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, nhead=2, dim_feedforward=16, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256)
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, text_BT: Tensor) -> Tensor:
        h_BTD = self.bytes(text_BT) + self.places.weight
        for block in self.blocks:
            h_BTD = block(h_BTD, src_mask=self.mask, is_causal=True)
        return self.head(self.norm(h_BTD))


def text() -> tuple[Tensor, Tensor]:
    """All topics as bytes: the first nine tenths to train, the rest held out."""
    whole = "\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()
    data = torch.frombuffer(bytearray(whole), dtype=torch.uint8).long()
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def batch(data: Tensor, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and next bytes, int64 [64, 48]; the same for a step whenever it is asked for."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(data) - CONTEXT, (64, 1), generator=generator)
    places = starts + torch.arange(CONTEXT + 1)[None, :]
    window = data[places.clamp(max=len(data) - 1)]
    return window[:, :-1].to(DEVICE), window[:, 1:].to(DEVICE)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", default="topics-lm")
    parser.add_argument("--rate-jump-at", type=int, help="step from which the rate is 300 times")
    parser.add_argument("--forever", action="store_true", help="begin anew with the next seed")
    folder = Path(os.environ.get("ESPER_DATA_DIR", "."))
    parser.add_argument("--lr", type=float, default=RATE, help="learning rate")
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--states", type=Path, help="keep states here that a branch begins from")
    parser.add_argument("--from", dest="state", type=Path, help="begin from this state")
    parser.add_argument("--checkpoint", type=Path, default=folder / "topics_lm.pt")
    return parser.parse_args()


def train(args: argparse.Namespace, seed: int, saved: dict[str, Any] | None) -> None:
    """One run, from a checkpoint where there is one. Raises ``RunStopped``."""
    torch.manual_seed(seed)
    text_to_train, held = text()
    model = TinyTransformer().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    def loss_on(data: Tensor, step: int) -> Tensor:
        inputs, targets = batch(data, step, seed)
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    def evaluate() -> float:
        return sum(loss_on(held, step).item() for step in range(4)) / 4

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
        model, optimizer, run=args.run, mode="supervised",
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
            if step == args.rate_jump_at:
                optimizer.param_groups[0]["lr"] = JUMP * RATE
            loss = loss_on(text_to_train, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done = step + 1
            session.step(loss)
            if done % args.every == 0:
                write(args.checkpoint)
                if args.states:
                    keep_newest(args.checkpoint, args.states / f"step-{done}.pt")
                print(f"step {done}  loss {loss.item():.3f}", flush=True)


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
