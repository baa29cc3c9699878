"""Silent-12: bugs that no loss curve shows, after TrainCheck (OSDI'25), on digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.rescue.cases import Case, Trial
from benchmarks.rescue.faults.at8 import data_of

TIER = "Silent-12"


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


def healthy(seed: int) -> Trial:
    torch.manual_seed(seed)
    x, y, held_x, held_y = data_of("digits", seed)
    model = Silent()
    return Trial(model, x / 100, y, held_x / 100, held_y, adam(model.parameters()))


def not_zeroed(seed: int) -> Trial:
    trial = healthy(seed)
    trial.zero_every = 10**9
    return trial


def zeroed_each_third(seed: int) -> Trial:
    trial = healthy(seed)
    trial.zero_every = 3
    return trial


def only_norms(seed: int) -> Trial:
    trial = healthy(seed)
    for name, parameter in trial.model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return trial


def swapped(seed: int) -> Trial:
    trial = healthy(seed)
    trial.model.head = nn.Linear(32, 10)
    return trial


def empty(seed: int) -> Trial:
    trial = healthy(seed)
    trial.optimizer = adam([nn.Parameter(torch.zeros(1))])
    return trial


def cut(seed: int) -> Trial:
    trial = healthy(seed)
    trial.model.cut = True  # type: ignore[assignment]
    return trial


def cloned(seed: int) -> Trial:
    trial = healthy(seed)
    blocks = trial.model.get_submodule("blocks")
    first = blocks.get_submodule("0").state_dict()
    for block in blocks.children():
        block.load_state_dict(first)
    return trial


def constant(seed: int) -> Trial:
    trial = healthy(seed)
    for name in ("enter.weight", "head.weight"):
        nn.init.constant_(trial.model.get_parameter(name), 0.05)
    return trial


def evaluation_mode(seed: int) -> Trial:
    trial = healthy(seed)

    def forget(t: Trial, step: int) -> None:
        t.model.train(step <= 20)

    trial.before = forget
    return trial


def evaluated_in_training(seed: int) -> Trial:
    trial = healthy(seed)

    @torch.no_grad()
    def evaluate(t: Trial, step: int) -> None:
        if step % 25 == 0:
            for place in range(0, 128, 32):
                t.model(t.x[place : place + 32])

    trial.before = evaluate
    return trial


def zero_times_zero(seed: int) -> Trial:
    trial = healthy(seed)
    nn.init.zeros_(trial.model.get_parameter("down.weight"))
    return trial


def rounded(seed: int) -> Trial:
    trial = healthy(seed)
    trial.model.bfloat16()
    trial.x, trial.held_x = trial.x.bfloat16(), trial.held_x.bfloat16()
    trial.optimizer = torch.optim.SGD(trial.model.parameters(), lr=1e-6)
    return trial


# name -> (training, rules that fit, the first step in which the fault acts)
SILENT_12: dict[str, tuple[Callable[[int], Trial], frozenset[str], int]] = {
    "zero_grad is missing": (not_zeroed, frozenset({"gradients_not_zeroed"}), 2),
    "zero_grad each third step": (zeroed_each_third, frozenset({"accumulation_miscounted"}), 2),
    "all but norms frozen": (only_norms, frozenset({"frozen_part"}), 1),
    "parameters were swapped": (swapped, frozenset({"not_held"}), 1),
    "empty optimizer": (empty, frozenset({"not_held"}), 1),
    "gradient is cut": (cut, frozenset({"unreached"}), 1),
    "init repeated in layers": (cloned, frozenset({"repeated_initialisation"}), 1),
    "init constant": (constant, frozenset({"repeated_initialisation"}), 1),
    "train() forgotten": (evaluation_mode, frozenset({"training_in_eval_mode"}), 21),
    "eval() forgotten": (evaluated_in_training, frozenset({"evaluation_in_train_mode"}), 25),
    "adapter of zero x zero": (zero_times_zero, frozenset({"zero_times_zero_adapter"}), 1),
    "updates round away": (rounded, frozenset({"nothing_moves"}), 1),
}


def cases(seed: int, steps: int) -> Iterator[Case]:
    """The twelve, each once."""
    for kind, (make, rules, begins) in SILENT_12.items():
        yield Case(
            TIER, kind, "digits", seed, steps, partial(make, seed), partial(healthy, seed),
            rules=rules, bug=True, by_definition=True, begins=begins,
        )  # fmt: skip
