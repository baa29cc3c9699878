"""A small net on scikit-learn's handwritten digits, on several processes of one machine.

    torchrun --nproc_per_node 2 examples/ddp_digits.py

Each rank has its own half of the rows. Esper is two lines: attach, and step.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import esper


class Net(nn.Module):
    """One hidden layer, really too narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Linear(64, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.squeeze(x)))


def digits(rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """This rank's images [n, 64] and labels [n]."""
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    return images[rank::ranks], torch.tensor(data.target)[rank::ranks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    images, labels = digits(rank, dist.get_world_size())
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    with esper.attach(model, optimizer, run="ddp-digits", mode="automatic") as session:
        generator = torch.Generator().manual_seed(rank)
        for step in range(args.steps):
            rows = torch.randint(len(images), (64,), generator=generator)
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.step(loss)
            if step == args.steps // 3:
                graft_by_hand(session, rank)
            if rank == 0 and step % 100 == 99:
                print(f"step {step + 1}  loss {loss.item():.3f}", flush=True)
    dist.destroy_process_group()


def graft_by_hand(session: esper.Session, rank: int) -> None:
    """The same call on every rank: all of them get the graft, or none."""
    receipt = session.graft("squeeze", "mlp_gelu_2048")
    if rank == 0:
        grafted = receipt.certificate.parameters
        print(f"grafted {grafted} parameters in {receipt.pause_ms:.0f} ms", flush=True)


if __name__ == "__main__":
    main()
