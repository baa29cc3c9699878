"""A run that is stuck in a bottleneck: left alone, in automatic mode, widened by hand, restarted.

    python -m benchmarks.bottleneck [--quick] [--seeds N] [--case CASE] [--json FILE]

A perceptron with three hidden units, and a net of three convolutions with one channel in the
middle, learn scikit-learn's digits, with a held-out third. Widening by hand adds 32 units after
1,500 steps, with random incoming weights, or, in the perceptron, with incoming weights along the
gradient (GradMax, Evci et al. 2022: the outgoing weights are zero, and the incoming ones are
singular vectors of the gradient of the outgoing layer against the inputs). "Training loss alone" is
automatic mode without an evaluate function. The restart is wider by 32 from the first step.

A ratio is the held-out loss over that of the same seed left alone, in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import esper

ADDED, ROWS, TRAINED = 32, 32, 1_200
STEPS, GROWN_AT, RATE = 4_500, 1_500, 5e-3
GRADMAX, RESTART = "by hand, GradMax", "restart, wide"
AUTOMATIC, ALONE = "automatic", "training loss alone"
ARMS = ("left alone", AUTOMATIC, ALONE, "by hand", GRADMAX, RESTART)


@dataclass(frozen=True, slots=True)
class Case:
    """A net with a bottleneck: ``make(units)``, and the layers on both sides of it."""

    make: Callable[[int], nn.Module]
    narrow: int
    since: str
    layer: str
    arms: tuple[str, ...] = ARMS


def perceptron(units: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, units), nn.ReLU(), nn.Linear(units, 10))


def convolutions(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, channels, 3, padding=1), nn.Tanh(), nn.Conv2d(channels, 16, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


CASES = {
    "perceptron": Case(perceptron, narrow=3, since="0", layer="2"),
    "convolutions": Case(
        convolutions, narrow=1, since="3", layer="5",
        arms=tuple(arm for arm in ARMS if arm != GRADMAX),
    ),
}  # fmt: skip


class Trained:
    """One run of one arm."""

    def __init__(self, case: Case, seed: int, units: int) -> None:
        self.case = case
        data = load_digits()
        x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
        self.draws = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(x), generator=self.draws)
        self.x, self.y = x[order], y[order]
        torch.manual_seed(seed)
        self.model = case.make(units)
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
            self.model, self.case.layer, "widen_hidden", since=self.case.since, hidden=ADDED,
            optimizer=self.optimizer, sample=self.x[:ROWS],
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


def run(case: Case, arm: str, seed: int, steps: int) -> tuple[float, int]:
    """(held-out loss at the end, step of the graft by Esper; -1: none)."""
    trained = Trained(case, seed, case.narrow + (ADDED if arm == RESTART else 0))
    session = None
    if arm in (AUTOMATIC, ALONE):
        evaluate = trained.held_out if arm == AUTOMATIC else None
        session = esper.attach(
            trained.model, trained.optimizer, mode="automatic", evaluate=evaluate, server=""
        )
    for step in range(1, steps + 1):
        loss = trained.step()
        if session is not None:
            session.step(loss)
        if step == GROWN_AT and arm.startswith("by hand"):
            trained.grow(along_gradient=arm == GRADMAX)
    at = -1
    if session is not None:
        at = session.adaptations[0].step if session.adaptations else -1
        session.close()
    return trained.held_out(), at


def compare(case: Case, seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Arm -> held-out losses, and steps of the grafts, of each seed."""
    found: dict[str, Any] = {}
    for arm in case.arms:
        results = [run(case, arm, seed, steps) for seed in seeds]
        losses = [loss for loss, _ in results]
        grafted = [at for _, at in results if at >= 0]
        found[arm] = {"losses": losses, "grafted": grafted}
        alone = found[case.arms[0]]["losses"]
        ratio = statistics.median(loss / own for loss, own in zip(losses, alone, strict=True))
        shown = " ".join(f"{loss:.3f}" for loss in losses)
        when = f"   grafted at {', '.join(map(str, grafted))}" if grafted else ""
        middle = statistics.median(losses)
        print(f"{arm:20} median {middle:.3f}  ratio {ratio:.2f}   {shown}{when}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, 3,500 steps")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--case", choices=tuple(CASES), help="only this one")
    parser.add_argument("--json", type=Path, help="write the losses to this file")
    options = parser.parse_args()
    seeds, steps = range(1 if options.quick else options.seeds), 3_500 if options.quick else STEPS
    found: dict[str, Any] = {}
    for name in [options.case] if options.case else CASES:
        print(f"{name}: held-out loss after {steps:,} steps, {len(seeds)} seeds")
        found[name] = compare(CASES[name], seeds, steps)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
