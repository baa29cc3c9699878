"""What Esper finds in runs with a fault, and what it says about their healthy twins.

``python -m benchmarks.rescue [--quick] [--seeds 100:125] [--json FILE]``

One torch thread, local mode, ``observe``. Two tiers:

    AT-8        eight training problems on circles and blobs times 100, after AutoTrainer
                (ICSE'21): nets 5 wide and 6 to 18 deep, faults from a seeded grid. A draw counts
                if its twin without the fault learns, and the fault hurts or is one by definition.
    Silent-12   bugs that no loss curve shows, after TrainCheck (OSDI'25), on digits

Columns: ``told``, a finding above info; ``named``, one of the rules that fit; the steps until
then; alarms of the twins. Limits of the rules were chosen on seeds 0 to 9; the seeds from 100 on
are for reports.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from sklearn.datasets import load_digits, make_blobs, make_circles
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.contracts import Severity

WIDTH = 5
LEARNED = 0.7  # accuracy of a healthy twin
HURT = 0.05  # accuracy that a fault costs
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Trial:
    """One training."""

    model: nn.Module
    x: Tensor
    y: Tensor
    optimizer: torch.optim.Optimizer
    loss: Loss = F.cross_entropy
    batch: int = 32
    zero_every: int = 1
    before: Callable[[Trial, int], None] = lambda trial, step: None
    evaluate: Callable[[], float] | None = None


@dataclass
class Outcome:
    """What was said about one training.

    Attributes:
        found: slug -> the step at which it was found, findings above info only.
        accuracy: at the end; NaN for a model that is no classifier.
    """

    found: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    accuracy: float = math.nan
    seconds: float = 0.0


@dataclass
class Row:
    """One kind of fault.

    Attributes:
        told, named: of ``runs``.
        steps: median number of steps until it was named.
        alarms: findings above info in ``clean_steps`` steps of the twins.
    """

    tier: str
    kind: str
    runs: int = 0
    told: int = 0
    named: int = 0
    steps: float = math.nan
    fitting: int = 0
    findings: int = 0
    alarms: int = 0
    clean_steps: int = 0
    other: list[str] = field(default_factory=list)


def train(trial: Trial, steps: int, seed: int) -> Outcome:
    """Trains while Esper observes."""
    outcome = Outcome(steps=steps)
    generator = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    with esper.attach(
        trial.model, trial.optimizer, mode="observe", evaluate=trial.evaluate, verbose=False
    ) as session:
        for step in range(1, steps + 1):
            trial.before(trial, step)
            rows = torch.randint(0, len(trial.x), (trial.batch,), generator=generator)
            if (step - 1) % trial.zero_every == 0:
                trial.optimizer.zero_grad()
            loss = trial.loss(trial.model(trial.x[rows]), trial.y[rows])
            if loss.requires_grad:
                torch.autograd.backward(loss)
            trial.optimizer.step()
            session.step(loss.detach())
            for finding in session.findings():
                if finding.severity is not Severity.INFO:
                    outcome.found.setdefault(finding.slug or str(finding.rule), step)
    outcome.seconds = time.perf_counter() - started
    outcome.accuracy = accuracy(trial.model, trial.x, trial.y)
    return outcome


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    out = model(x)
    if y.ndim != 1 or out.ndim != 2 or out.shape[1] < 2:
        return math.nan
    return float((out.argmax(1) == y).float().mean())


# --- AT-8 -----------------------------------------------------------------------------------------


@dataclass
class Draw:
    """A point of the grid; a fault changes it."""

    data: str
    depth: int
    activation: type[nn.Module]
    optimizer: str
    seed: int
    rate: float = 1.0
    gain: float = 1.0
    bias: float = 0.0
    scale: float = 0.01
    batch: int = 32
    end: Callable[[], nn.Module] | None = None
    loss: Loss = F.cross_entropy
    out: int = 0

    def trial(self) -> Trial:
        torch.manual_seed(self.seed)
        x, y = points(self.data, self.seed)
        classes = self.out or int(y.max()) + 1
        model = net(self.depth, self.activation, classes, self.gain, self.bias)
        if self.end is not None:
            model.append(self.end())
        return Trial(model, x * self.scale, y, self._optimizer(model), self.loss, self.batch)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), lr=0.01 * self.rate, momentum=0.9)
        return torch.optim.Adam(model.parameters(), lr=3e-3 * self.rate)


def points(data: str, seed: int) -> tuple[Tensor, Tensor]:
    if data == "circles":
        x, y = make_circles(1000, noise=0.1, random_state=seed)
    else:
        x, y = make_blobs(1000, centers=3, cluster_std=2, random_state=seed)
        x = x / 10.0
    return torch.tensor(100 * x[:700], dtype=torch.float32), torch.tensor(y[:700])


def net(
    depth: int, activation: type[nn.Module], classes: int, gain: float, bias: float
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for place in range(depth):
        linear = nn.Linear(2 if place == 0 else WIDTH, WIDTH)
        standard = math.sqrt(2.0) if activation is nn.ReLU else 5.0 / 3.0
        nn.init.orthogonal_(linear.weight, standard * gain)
        nn.init.constant_(linear.bias, bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, classes))


def sum_of_squares(out: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(out, target.float().unsqueeze(1))


def likelihood(out: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(out, target)


def binary(out: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(out, 2.0 * target.float().unsqueeze(1))


def vanish(draw: Draw, dice: random.Random) -> None:
    draw.activation = nn.Sigmoid if dice.random() < 0.5 else nn.Tanh
    draw.gain = 0.3 if draw.activation is nn.Tanh else 0.6
    draw.depth = max(draw.depth, 9)


def explode(draw: Draw, dice: random.Random) -> None:
    draw.activation, draw.optimizer = nn.ReLU, "sgd"
    draw.gain = dice.choice([3.0, 5.0, 8.0])


def die(draw: Draw, dice: random.Random) -> None:
    draw.activation = nn.ReLU
    if dice.random() < 0.5:
        draw.bias = dice.choice([-2.0, -5.0])
    else:
        draw.rate = dice.choice([100.0, 300.0])


def oscillate(draw: Draw, dice: random.Random) -> None:
    draw.activation, draw.optimizer = nn.Tanh, "sgd"
    draw.rate, draw.batch = dice.choice([30.0, 100.0, 300.0]), dice.choice([8, 32])


def slow_down(draw: Draw, dice: random.Random) -> None:
    draw.rate = dice.choice([1e-3, 3e-4])


def squash(draw: Draw, dice: random.Random) -> None:
    ends: list[Callable[[], nn.Module]] = [lambda: nn.Softmax(1), nn.ReLU, nn.Sigmoid]
    draw.end = dice.choice(ends)


def wrong_loss(draw: Draw, dice: random.Random) -> None:
    if dice.random() < 0.5:
        draw.loss = likelihood
    else:
        draw.loss, draw.out = binary, 1


def unscaled(draw: Draw, dice: random.Random) -> None:
    draw.scale = 1.0


HARD = {"wrong_output_activation", "wrong_loss", "abnormal_data"}  # faults by definition
# kind -> (fault, rules that fit)
AT_8: dict[str, tuple[Callable[[Draw, random.Random], None], frozenset[str]]] = {
    "vanishing gradient": (
        vanish,
        frozenset({"vanishing_gradient", "bad_initialisation"}),
    ),
    "exploding gradient": (
        explode,
        frozenset({"exploding_gradient", "bad_initialisation", "non_finite"}),
    ),
    "dying ReLU": (die, frozenset({"dying_relu"})),
    "oscillating loss": (
        oscillate,
        frozenset({"oscillating_loss", "update_ratio_high", "loss_spike", "saturation"}),
    ),
    "slow convergence": (slow_down, frozenset({"slow_convergence", "update_ratio_low"})),
    "wrong output activation": (squash, frozenset({"wrong_output_activation"})),
    "wrong loss": (wrong_loss, frozenset({"wrong_loss"})),
    "abnormal data": (unscaled, frozenset({"abnormal_data"})),
}


def draws(kind: str, seeds: range) -> Iterator[tuple[Draw, Draw]]:
    """(healthy, faulty) for each seed."""
    for seed in seeds:
        dice = random.Random(f"{kind} {seed}")
        activation = dice.choice([nn.Tanh, nn.ReLU])
        healthy = Draw(
            data=dice.choice(["circles", "blobs"]),
            depth=dice.randint(6, 18),
            activation=activation,
            optimizer=dice.choice(["adam", "sgd"]),
            seed=seed,
        )
        faulty = Draw(**healthy.__dict__)
        AT_8[kind][0](faulty, dice)
        # The twin differs by the fault alone.
        healthy.activation = nn.Tanh if faulty.activation is nn.Sigmoid else faulty.activation
        healthy.optimizer, healthy.depth = faulty.optimizer, faulty.depth
        yield healthy, faulty


def at_8(kind: str, seeds: range, steps: int) -> Row:
    row = Row("AT-8", kind)
    named_at: list[int] = []
    rules = AT_8[kind][1]
    for healthy, faulty in draws(kind, seeds):
        twin = train(healthy.trial(), steps, healthy.seed)
        if not twin.accuracy >= LEARNED:
            continue  # not healthy, whatever the reason
        row.alarms += len(twin.found)
        row.clean_steps += twin.steps
        row.other += [f"twin {healthy.seed}: {slug}" for slug in twin.found]
        sick = train(faulty.trial(), steps, faulty.seed)
        hurts = not sick.accuracy >= twin.accuracy - HURT
        if not hurts and kind.replace(" ", "_") not in HARD:
            continue
        add(row, sick, rules, named_at, f"seed {faulty.seed}")
    row.steps = median(named_at) if named_at else math.nan
    return row


def add(row: Row, outcome: Outcome, rules: frozenset[str], named_at: list[int], name: str) -> None:
    """Counts one run with a fault."""
    row.runs += 1
    row.told += bool(outcome.found)
    fitting = {slug: step for slug, step in outcome.found.items() if slug in rules}
    row.named += bool(fitting)
    row.fitting += len(fitting)
    row.findings += len(outcome.found)
    if fitting:
        named_at.append(min(fitting.values()))
    else:
        row.other.append(f"{name}: not named, but {sorted(outcome.found) or 'nothing'}")


# --- Silent-12 ------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16.0, torch.tensor(data.target)


class Silent(nn.Module):
    """A small net with everything that the faults need."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(64, 32), nn.BatchNorm1d(32)
        self.blocks = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(32, 10)
        self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)
        nn.init.zeros_(self.up.weight)
        self.cut = False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.enter(x)))
        for block in self.blocks:
            h = h + torch.relu(block(h))
        h = h + self.up(self.down(h))
        h = h.detach() if self.cut else h
        out: Tensor = self.head(self.drop(h))
        return out


def adam(parameters: Iterator[nn.Parameter] | list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def healthy_silent() -> Trial:
    x, y = digits()
    model = Silent()
    return Trial(model, x, y, adam(model.parameters()))


def not_zeroed() -> Trial:
    trial = healthy_silent()
    trial.zero_every = 10**9
    return trial


def zeroed_each_third() -> Trial:
    trial = healthy_silent()
    trial.zero_every = 3
    return trial


def only_norms() -> Trial:
    trial = healthy_silent()
    for name, parameter in trial.model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return trial


def swapped() -> Trial:
    trial = healthy_silent()
    trial.model.head = nn.Linear(32, 10)
    return trial


def empty() -> Trial:
    trial = healthy_silent()
    trial.optimizer = adam([nn.Parameter(torch.zeros(1))])
    return trial


def cut() -> Trial:
    trial = healthy_silent()
    trial.model.cut = True  # type: ignore[assignment]
    return trial


def cloned() -> Trial:
    trial = healthy_silent()
    blocks = trial.model.get_submodule("blocks")
    first = blocks.get_submodule("0").state_dict()
    for block in blocks.children():
        block.load_state_dict(first)
    return trial


def constant() -> Trial:
    trial = healthy_silent()
    for name in ("enter.weight", "head.weight"):
        nn.init.constant_(trial.model.get_parameter(name), 0.05)
    return trial


def evaluation_mode() -> Trial:
    trial = healthy_silent()

    def forget(t: Trial, step: int) -> None:
        t.model.train(step <= 20)

    trial.before = forget
    return trial


def evaluated_in_training() -> Trial:
    trial = healthy_silent()

    @torch.no_grad()
    def evaluate(t: Trial, step: int) -> None:
        if step % 25 == 0:
            for place in range(0, 128, 32):
                t.model(t.x[place : place + 32])

    trial.before = evaluate
    return trial


def zero_times_zero() -> Trial:
    trial = healthy_silent()
    nn.init.zeros_(trial.model.get_parameter("down.weight"))
    return trial


def rounded() -> Trial:
    trial = healthy_silent()
    trial.model.bfloat16()
    trial.x = trial.x.bfloat16()
    trial.optimizer = torch.optim.SGD(trial.model.parameters(), lr=1e-6)
    return trial


# name -> (training, rules that fit, step by which it must be told)
SILENT_12: dict[str, tuple[Callable[[], Trial], frozenset[str], int]] = {
    "zero_grad is missing": (not_zeroed, frozenset({"gradients_not_zeroed"}), 2),
    "zero_grad each third step": (zeroed_each_third, frozenset({"accumulation_miscounted"}), 8),
    "all but norms frozen": (only_norms, frozenset({"frozen_part"}), 1),
    "parameters were swapped": (swapped, frozenset({"not_held"}), 1),
    "empty optimizer": (empty, frozenset({"not_held"}), 1),
    "gradient is cut": (cut, frozenset({"unreached"}), 3),
    "init repeated in layers": (cloned, frozenset({"repeated_initialisation"}), 1),
    "init constant": (constant, frozenset({"repeated_initialisation"}), 1),
    "train() forgotten": (evaluation_mode, frozenset({"training_in_eval_mode"}), 24),
    "eval() forgotten": (evaluated_in_training, frozenset({"evaluation_in_train_mode"}), 50),
    "adapter of zero x zero": (zero_times_zero, frozenset({"zero_times_zero_adapter"}), 1),
    "updates round away": (rounded, frozenset({"nothing_moves"}), 3),
}


def silent_12(steps: int) -> list[Row]:
    rows = []
    for name, (make, rules, _) in SILENT_12.items():
        row = Row("Silent-12", name)
        named_at: list[int] = []
        torch.manual_seed(0)
        add(row, train(make(), steps, 0), rules, named_at, name)
        row.steps = median(named_at) if named_at else math.nan
        rows.append(row)
    torch.manual_seed(0)
    twin = train(healthy_silent(), 10 * steps, 0)
    rows.append(
        Row(
            "Silent-12",
            "healthy",
            alarms=len(twin.found),
            clean_steps=twin.steps,
            other=[*twin.found],
        )
    )
    return rows


# --- the report -----------------------------------------------------------------------------------


def report(rows: list[Row]) -> Iterator[str]:
    yield row_of("tier", "fault", "runs", "told", "named", "step", "twins: alarms/steps")
    for row in rows:
        told = f"{row.told / row.runs:.0%}" if row.runs else "-"
        named = f"{row.named / row.runs:.0%}" if row.runs else "-"
        clean = f"{row.alarms}/{row.clean_steps}" if row.clean_steps else ""
        step = "-" if math.isnan(row.steps) else f"{row.steps:.0f}"
        yield row_of(row.tier, row.kind, str(row.runs), told, named, step, clean)
    for tier in dict.fromkeys(row.tier for row in rows):
        yield summary(tier, [row for row in rows if row.tier == tier])
    for row in rows:
        for line in row.other:
            yield f"  {row.kind}: {line}"


def row_of(tier: str, kind: str, runs: str, told: str, named: str, step: str, clean: str) -> str:
    return f"{tier:<10} {kind:<26} {runs:>5} {told:>6} {named:>6} {step:>6} {clean:>20}"


def summary(tier: str, rows: list[Row]) -> str:
    runs, clean = sum(row.runs for row in rows), sum(row.clean_steps for row in rows)
    told, named = sum(row.told for row in rows), sum(row.named for row in rows)
    fitting, findings = sum(row.fitting for row in rows), sum(row.findings for row in rows)
    alarms = sum(row.alarms for row in rows)
    return (
        f"{tier}: told {told} of {runs}, named {named} of {runs}, precision "
        f"{fitting / max(1, findings):.2f}, {1e4 * alarms / max(1, clean):.1f} false alarms in "
        f"10,000 clean steps ({alarms} in {clean})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="three seeds of each kind")
    parser.add_argument("--seeds", default="100:125", help="first:end")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("esper").setLevel(logging.CRITICAL)
    first, end = map(int, arguments.seeds.split(":"))
    seeds = range(first, first + 3) if arguments.quick else range(first, end)
    rows = [at_8(kind, seeds, arguments.steps) for kind in AT_8]
    rows += silent_12(100)
    print("\n".join(report(rows)))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
