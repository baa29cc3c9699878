"""Does a graph network over the layers choose better grafts than the linear bandit? In replay.

    python -m benchmarks.layer_graph [--graphs FILE] [--document docs/layer-graph.md]

The shipped table has grafts of known gain, several of each training. The trainings are watched
again until the moment of their grafts, for the graph of their layers: nodes are layers with their
newest signals, edges join layers that run one after the other. Then each model, fitted on the other
kinds of hosts, chooses among the grafts that were tried in a training, or none where it expects no
gain; what it chose has its known gain.

Shape legend: L layers, F features of a layer, C features of a graft, H hidden units.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.confidence_cases import watched
from esper import blueprints
from esper.contracts import AdaptationType
from esper.health import extract_features
from esper.policy.cases import MEASURED, Case, shipped

Doubles = NDArray[np.float64]

TABLE = range(1000, 3000)  # seeds of the mixed hosts; those from 3000 on are narrow runs
HIDDEN, ROUNDS, EPOCHS, RATE, DECAY = 16, 2, 20, 3e-3, 1e-2
MEMBERS = 3  # networks whose mean is taken; one alone depends on its first weights
RIDGE = 1.0
RESAMPLED = 5_000
_TYPES = tuple(AdaptationType)


@dataclass(frozen=True)
class Tried:
    """One graft of the table in the graph of its training.

    Attributes:
        nodes: [L][F], features of the layers in the order in which they run.
        place: the layer that is grafted.
        graft: [C], features of the graft, which the linear model has too.
    """

    seed: int
    host: str
    gain: float
    nodes: list[list[float]]
    place: int
    graft: list[float]


def collect(cases: Sequence[Case], path: Path | None) -> list[Tried]:
    """The grafts of the table with their graphs; ``path`` keeps them."""
    found: list[Tried] = []
    if path is not None and path.exists():
        found = [Tried(**entry) for entry in json.loads(path.read_text())]
    done = {one.seed for one in found}
    for seed in sorted({case.seed for case in cases} - done):
        own = [case for case in cases if case.seed == seed]
        found += _of_training(seed, own)
        print(f"training {seed}: {len(own)} grafts", flush=True)
        if path is not None:
            path.write_text(json.dumps([asdict(one) for one in found]))
    return found


def _of_training(seed: int, cases: Sequence[Case]) -> list[Tried]:
    """In the order of the table; a graft that could not be made is not in it.

    Raises:
        ValueError: this code makes other trainings than the table is of.
    """
    start = watched(seed)
    features = extract_features(start.snapshot)
    layers = sorted(start.snapshot.layers, key=lambda layer: layer.order)
    rows = {layer.name: features.latest[features.index[layer.name]] for layer in layers}
    nodes = [[math.log10(max(1, one.parameters)), *_known(rows[one.name])] for one in layers]
    places = iter(start.places)
    found = []
    for case in cases:
        kinds = {layer.name: (number, layer.kind) for number, layer in enumerate(layers)}
        match = next(
            (p for p in places if p[2] == case.choice and kinds[p[1]][1] == case.layer), None
        )
        if match is None:
            raise ValueError(f"the grafts of training {seed} are other ones than in the table")
        found.append(Tried(seed, case.host, case.gain, nodes, kinds[match[1]][0], _graft(case)))
    return found


def _known(values: NDArray[np.float32]) -> list[float]:
    """Signals range over decades; an unknown one is 0."""
    wide = np.sign(values) * np.log1p(1e3 * np.abs(values))
    return [float(value) for value in np.nan_to_num(wide, nan=0.0, posinf=0.0, neginf=0.0)]


def _graft(case: Case) -> list[float]:
    """Kind of adaptation, whether a finding is open, and what was measured, as far as known."""
    kind = blueprints.get_blueprint(case.choice).adaptation_type
    measured = [case.measured.get(name, 0.0) for name in MEASURED]
    finding = float(bool(case.finding))
    wider = float(case.choice == "widen_hidden")
    return [1.0, finding, wider, *(float(kind is one) for one in _TYPES), *measured]


# --- models ---------------------------------------------------------------------------------------


def linear(known: Sequence[Tried], asked: Sequence[Tried]) -> Doubles:
    """The bandit's model: ridge regression of the gain on the features of the graft."""
    centre, scale = _scaling(np.array([one.graft for one in known]))
    rows, targets = (np.array([one.graft for one in known]) - centre) / scale, _gains(known)
    weights = np.linalg.solve(rows.T @ rows + RIDGE * np.eye(rows.shape[1]), rows.T @ targets)
    return np.asarray(((np.array([one.graft for one in asked]) - centre) / scale) @ weights)


def _scaling(rows: Doubles) -> tuple[Doubles, Doubles]:
    """Of each column; the first one is 1 and stays so."""
    centre, scale = rows.mean(0), rows.std(0)
    scale[scale < 1e-9] = 1.0
    centre[0], scale[0] = 0.0, 1.0
    return centre, scale


class GraphNetwork(nn.Module):
    """Messages between layers that run one after the other, then the gain of a graft at one."""

    def __init__(self, features: int, graft: int) -> None:
        super().__init__()
        self.enter = nn.Linear(features, HIDDEN)
        self.rounds = nn.ModuleList(nn.Linear(3 * HIDDEN, HIDDEN) for _ in range(ROUNDS))
        self.leave = nn.Sequential(
            nn.Linear(2 * HIDDEN + graft, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1)
        )

    def forward(self, nodes_LF: Tensor, place: int, graft_C: Tensor) -> Tensor:
        """float32 []: the expected gain."""
        h_LH = torch.tanh(self.enter(nodes_LF))
        for layer in self.rounds:
            none = torch.zeros_like(h_LH[:1])
            before, behind = torch.cat([none, h_LH[:-1]]), torch.cat([h_LH[1:], none])
            h_LH = h_LH + torch.tanh(layer(torch.cat([h_LH, before, behind], dim=1)))
        seen = torch.cat([h_LH[place], h_LH.mean(0), graft_C])
        found: Tensor = self.leave(seen).squeeze()
        return found


def graph(known: Sequence[Tried], asked: Sequence[Tried]) -> Doubles:
    """Mean of some networks with different first weights."""
    said = [_one_network(known, asked, seed) for seed in range(MEMBERS)]
    return np.asarray(np.mean(said, axis=0), dtype=np.float64)


def _one_network(known: Sequence[Tried], asked: Sequence[Tried], seed: int) -> Doubles:
    torch.manual_seed(seed)
    node = _scaling(np.array([row for one in known for row in one.nodes]))
    graft = _scaling(np.array([one.graft for one in known]))

    def inputs(one: Tried) -> tuple[Tensor, int, Tensor]:
        nodes = (np.array(one.nodes) - node[0]) / node[1]
        own = (np.array(one.graft) - graft[0]) / graft[1]
        return torch.tensor(nodes).float(), one.place, torch.tensor(own).float()

    network = GraphNetwork(len(known[0].nodes[0]), len(known[0].graft))
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    seen, targets = [inputs(one) for one in known], torch.tensor(_gains(known)).float()
    dice = np.random.default_rng(seed)
    for _ in range(EPOCHS):
        for rows in np.array_split(dice.permutation(len(seen)), max(1, len(seen) // 32)):
            optimizer.zero_grad()
            said = torch.stack([network(*seen[row]) for row in rows])
            torch.autograd.backward(nn.functional.mse_loss(said, targets[rows]))
            optimizer.step()
    with torch.no_grad():
        return np.array([float(network(*inputs(one))) for one in asked])


def _gains(tried: Sequence[Tried]) -> Doubles:
    """A run that diverged lost everything, and no more."""
    return np.array([min(1.0, max(-1.0, one.gain)) for one in tried])


# --- replay ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replay:
    """What a policy would have earned: by training, the gain of its choice."""

    name: str
    earned: dict[int, float]
    error: float

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.earned.values())))


def replays(tried: Sequence[Tried]) -> list[Replay]:
    """Each model on trainings of a kind of host that it has not seen."""
    said = {"linear bandit": np.zeros(len(tried)), "graph network": np.zeros(len(tried))}
    for host in sorted({one.host for one in tried}):
        known = [one for one in tried if one.host != host]
        places = [number for number, one in enumerate(tried) if one.host == host]
        asked = [tried[number] for number in places]
        said["linear bandit"][places] = linear(known, asked)
        said["graph network"][places] = graph(known, asked)
    gains = _gains(tried)
    said = {"nothing": -np.ones(len(tried)), **said, "best, in hindsight": gains}
    errors = {name: float(np.mean((values - gains) ** 2)) for name, values in said.items()}
    return [Replay(name, _earned(tried, values), errors[name]) for name, values in said.items()]


def _earned(tried: Sequence[Tried], said: Doubles) -> dict[int, float]:
    gains = _gains(tried)
    found = {}
    for seed in sorted({one.seed for one in tried}):
        own = [number for number, one in enumerate(tried) if one.seed == seed]
        best = max(own, key=lambda number: said[number])
        found[seed] = float(gains[best]) if said[best] > 0.0 else 0.0
    return found


def difference(one: Replay, other: Replay) -> tuple[float, float, float]:
    """(mean, 95 % interval) of what one earned more in the same trainings."""
    values = np.array([one.earned[seed] - other.earned[seed] for seed in one.earned])
    drawn = values[np.random.default_rng(0).integers(0, len(values), (RESAMPLED, len(values)))]
    low, high = np.percentile(drawn.mean(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def document(tried: Sequence[Tried], found: Sequence[Replay]) -> str:
    trainings, kinds = len({one.seed for one in tried}), len({one.host for one in tried})
    named = {replay.name: replay for replay in found}
    mean, low, high = difference(named["graph network"], named["linear bandit"])
    wins = "it may be promoted" if low > 0.0 else "it is not promoted"
    lines = [
        "# A graph network over the layers, against the linear bandit",
        "",
        "Written by `python -m benchmarks.layer_graph --document docs/layer-graph.md`. Nothing",
        "here is edited by hand.",
        "",
        f"{len(tried)} grafts of known gain in {trainings} trainings of {kinds} kinds of hosts,",
        "from the shipped table; the trainings are watched again for the graph of their layers.",
        "Each model is fitted on the other kinds of hosts. In each training it chooses one of the",
        "grafts that were tried there, or none where it expects no gain. Both have the same",
        "features of a graft; the network has two rounds of messages between layers that run one",
        "after the other, too.",
        "",
        "| policy | mean gain of its choices | squared error of the expected gain |",
        "|---|---|---|",
        *(
            f"| {one.name} | {one.mean:+.2%} | "
            f"{'-' if one.name in ('nothing', 'best, in hindsight') else f'{one.error:.4f}'} |"
            for one in found
        ),
        "",
        f"The network earned {mean:+.2%} against the bandit (95 %: {low:+.2%} to {high:+.2%}, over",
        f"trainings): {wins}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--graphs", type=Path, help="keeps the graphs; what is there is used")
    parser.add_argument("--trainings", type=int, default=10_000, help="at most, the first ones")
    parser.add_argument("--document", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    cases = [case for case in shipped() if case.kind == "graft" and case.seed in TABLE]
    seeds = sorted({case.seed for case in cases})[: given.trainings]
    cases = [case for case in cases if case.seed in seeds]
    tried = collect(cases, given.graphs)
    text = document(tried, replays(tried))
    print(text)
    if given.document:
        given.document.write_text(text)


if __name__ == "__main__":
    main()
