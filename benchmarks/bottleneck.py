"""A run that is stuck in a bottleneck: left alone, in automatic mode, widened by hand, restarted.

    python -m benchmarks.bottleneck [--quick] [--json FILE]

A perceptron with three hidden units learns scikit-learn's digits, with a held-out third. Widening
by hand adds 32 units after 1,500 steps, with random incoming weights, or with incoming weights
along the gradient (GradMax, Evci et al. 2022: the outgoing weights are zero, and the incoming ones
are singular vectors of the gradient of the outgoing layer against the inputs). The restart is a
perceptron with 35 units from the first step.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import esper

NARROW, ADDED, ROWS, TRAINED = 3, 32, 32, 1_200
STEPS, GROWN_AT, RATE = 4_000, 1_500, 5e-3
ARMS = ("left alone", "automatic", "by hand", "by hand, GradMax", "restart, wide")


class Trained:
    """One run of one arm."""

    def __init__(self, seed: int, units: int) -> None:
        data = load_digits()
        x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
        self.draws = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(x), generator=self.draws)
        self.x, self.y = x[order], y[order]
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(64, units), nn.ReLU(), nn.Linear(units, 10))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE)

    def step(self) -> float:
        rows = torch.randint(0, TRAINED, (ROWS,), generator=self.draws)
        loss = F.cross_entropy(self.model(self.x[rows]), self.y[rows])
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        return float(loss.detach())

    def held_out(self) -> float:
        with torch.no_grad():
            return F.cross_entropy(self.model(self.x[TRAINED:]), self.y[TRAINED:]).item()

    def grow(self, *, along_gradient: bool) -> None:
        receipt = esper.graft(
            self.model, "2", "widen_hidden", since="0", hidden=ADDED, optimizer=self.optimizer,
            sample=self.x[:ROWS],
        )  # fmt: skip
        if along_gradient:
            with torch.no_grad():
                weight = receipt.graft.get_parameter("weight_in")
                weight.copy_(self._directions(weight))

    def _directions(self, random_HI: Tensor) -> Tensor:
        """Singular vectors of the gradient, with both signs, as long as the random ones."""
        x, y = self.x[:TRAINED], self.y[:TRAINED]
        with torch.no_grad():
            g_NO = self.model(x).softmax(1) - F.one_hot(y, 10)
            _, _, v_RI = torch.linalg.svd(g_NO.T @ x, full_matrices=False)
        both = torch.cat([v_RI, -v_RI])[: len(random_HI)] * random_HI.norm(dim=1).mean()
        return torch.cat([both, random_HI[len(both) :]])


def run(arm: str, seed: int, steps: int) -> float:
    """The held-out loss at the end."""
    trained = Trained(seed, NARROW + ADDED if arm == "restart, wide" else NARROW)
    session = None
    if arm == "automatic":
        session = esper.attach(
            trained.model, trained.optimizer, mode="automatic", evaluate=trained.held_out, server=""
        )
    for step in range(1, steps + 1):
        loss = trained.step()
        if session is not None:
            session.step(loss)
        if step == GROWN_AT and arm.startswith("by hand"):
            trained.grow(along_gradient=arm.endswith("GradMax"))
    if session is not None:
        session.close()
    return trained.held_out()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, 3,000 steps")
    parser.add_argument("--json", type=Path, help="write the losses to this file")
    options = parser.parse_args()
    seeds, steps = (range(1), 3_000) if options.quick else (range(5), STEPS)
    found: dict[str, Any] = {}
    print(f"held-out loss after {steps:,} steps, {len(seeds)} seeds")
    for arm in ARMS:
        losses = [run(arm, seed, steps) for seed in seeds]
        found[arm] = losses
        shown = " ".join(f"{loss:.3f}" for loss in losses)
        print(f"{arm:18} median {statistics.median(losses):.3f}   {shown}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
