"""D4: the user's optimizer and schedulers work on as if no graft had come.

Every kind trains the same model twice: alone, and with a graft that it does not know of. The graft
is identity at birth and its weights are held still, so the host's numbers must be equal to the bit.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import prodigyopt
import pytest
import schedulefree
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedules
from torch.optim import swa_utils

import esper
from esper.grafting import Receipt, companions_of
from esper.grafting.companion import WARMUP_STEPS

BEFORE, AFTER = 3, 5


def model_of_a_seed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)


def loss_of(model: nn.Module, number: int) -> Tensor:
    x, y = batch(number)
    return F.mse_loss(model(x), y)


@dataclass
class Run:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedulers: list[Any] = field(default_factory=list)
    taken: int = 0

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = loss_of(self.model, self.taken)
        loss.backward()
        self.taken += 1
        self.optimizer.step()
        for scheduler in self.schedulers:
            plateau = isinstance(scheduler, schedules.ReduceLROnPlateau)
            scheduler.step(1.0) if plateau else scheduler.step()

    def go(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def graft(self, blueprint: str = "mlp_gelu_2048", layer: str = "2") -> Receipt:
        return esper.graft(self.model, layer, blueprint, optimizer=self.optimizer)

    def host_weights(self) -> list[Tensor]:
        return [p for name, p in self.model.named_parameters() if ".esper." not in name]


def run_of(make: Callable[[Any], torch.optim.Optimizer], *then: Callable[[Any], Any]) -> Run:
    model = model_of_a_seed()
    optimizer = make(model.parameters())
    return Run(model, optimizer, [schedule(optimizer) for schedule in then])


def hold_still(receipt: Receipt) -> None:
    """The graft stays the identity, so the host trains as if it were not there."""
    for parameter in receipt.graft.parameters():
        parameter.requires_grad_(False)


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, all the way down."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or callable(a)


def look_of(run: Run) -> dict[str, Any]:
    """All that the user can see of the optimizer and the schedulers."""
    plain = [
        {k: v for k, v in vars(s).items() if k != "_schedulers" and v is not run.optimizer}
        for s in run.schedulers
    ]
    return {
        "state_dict": run.optimizer.state_dict(),
        "keys": [sorted(group) for group in run.optimizer.param_groups],
        "groups": [len(group["params"]) for group in run.optimizer.param_groups],
        "states": len(run.optimizer.state),
        "attributes": sorted(vars(run.optimizer)),
        "schedulers": plain,
        "weights": run.host_weights(),
    }


def two_groups(kind: Any, **more: Any) -> Callable[[Any], torch.optim.Optimizer]:
    def make(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        held = list(parameters)
        groups = [{"params": held[:2], "lr": 1e-3}, {"params": held[2:], "lr": 2e-3}]
        return kind(groups, **more)

    return make


class ByHand:
    """A schedule written over ``param_groups``: rate, momentum and decay."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        for group in self._optimizer.param_groups:
            group["lr"] *= 0.9
            group["weight_decay"] = 0.01 * self.steps
            group["betas"] = (0.9 - 0.01 * self.steps, 0.99)


adamw = two_groups(torch.optim.AdamW)
sgd = two_groups(torch.optim.SGD, momentum=0.9)
SCHEDULERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], Callable[[Any], Any]]] = {
    "lambda": (adamw, lambda o: schedules.LambdaLR(o, [lambda e: 0.9**e, lambda e: 0.8**e])),
    "multiplicative": (adamw, lambda o: schedules.MultiplicativeLR(o, lambda e: 0.9)),
    "step": (adamw, lambda o: schedules.StepLR(o, 2, 0.5)),
    "multi_step": (adamw, lambda o: schedules.MultiStepLR(o, [2, 5])),
    "cosine": (adamw, lambda o: schedules.CosineAnnealingLR(o, 20)),
    "warm_restarts": (adamw, lambda o: schedules.CosineAnnealingWarmRestarts(o, 3)),
    "one_cycle": (adamw, lambda o: schedules.OneCycleLR(o, [1e-2, 2e-2], total_steps=20)),
    "cyclic": (sgd, lambda o: schedules.CyclicLR(o, [1e-4, 2e-4], 1e-2, step_size_up=3)),
    "sequential": (
        adamw,
        lambda o: schedules.SequentialLR(
            o, [schedules.LinearLR(o, 0.1, total_iters=4), schedules.LambdaLR(o, lambda e: 0.9**e)],
            milestones=[4],
        ),
    ),
    "chained": (
        adamw,
        lambda o: schedules.ChainedScheduler(
            [schedules.ConstantLR(o, total_iters=4), schedules.ExponentialLR(o, 0.9)]
        ),
    ),
    "plateau": (
        adamw, lambda o: schedules.ReduceLROnPlateau(o, patience=0, min_lr=[1e-5, 1e-6]),
    ),
    "swa": (adamw, lambda o: swa_utils.SWALR(o, [1e-3, 1e-4], anneal_epochs=5)),
    "by_hand": (adamw, ByHand),
}  # fmt: skip

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.5),
    "adamw_fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "adam_maximize": lambda p: torch.optim.Adam(p, lr=1e-4, maximize=True),
    "tensor_rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3), foreach=False),
    "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=1e-3),
    "prodigy": lambda p: prodigyopt.Prodigy(p),
    "schedule_free": lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-3),
    "schedule_free_sgd": lambda p: schedulefree.SGDScheduleFree(p, lr=0.05),
}

RUNS: dict[str, Callable[[], Run]] = {
    **{name: lambda make=make: run_of(make) for name, make in OPTIMIZERS.items()},
    **{
        f"schedule_{name}": lambda make=make, then=then: run_of(make, then)
        for name, (make, then) in SCHEDULERS.items()
    },
}


@pytest.fixture(params=RUNS)
def kind(request: pytest.FixtureRequest) -> Callable[[], Run]:
    def start() -> Run:
        run = RUNS[request.param]()
        enter_training(run.optimizer)
        run.go(BEFORE)
        return run

    return start


def enter_training(optimizer: Any) -> None:
    """As schedule-free optimizers ask for it."""
    if "train_mode" in optimizer.defaults:
        optimizer.train()


def test_nothing_about_optimizer_and_schedulers_tells_of_the_graft(
    kind: Callable[[], Run],
) -> None:
    alone, grafted = kind(), kind()
    hold_still(grafted.graft())

    alone.go(AFTER)
    grafted.go(AFTER)

    assert same(look_of(grafted), look_of(alone))


def test_the_graft_learns_beside_them(kind: Callable[[], Run]) -> None:
    run = kind()
    receipt = run.graft()
    start = [p.detach().clone() for p in receipt.graft.parameters()]
    run.go(AFTER)
    for parameter, before in zip(receipt.graft.parameters(), start, strict=True):
        assert not torch.equal(parameter, before)
        assert parameter.isfinite().all()
    assert receipt.undo().exact


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_rate_of_a_graft_is_the_layers_at_every_step(name: str) -> None:
    run = run_of(SCHEDULERS[name][0], SCHEDULERS[name][1])
    run.go(BEFORE)
    run.graft()
    (companion,) = companions_of(run.optimizer)
    for step in range(AFTER):
        used = dict(run.optimizer.param_groups[1])  # of the layer "2"
        run.step()
        (own,) = companion.optimizer.param_groups
        assert own["lr"] == pytest.approx(used["lr"] * (step + 1) / WARMUP_STEPS)
        for key in ("momentum", "betas"):
            assert own.get(key) == used.get(key)
        assert own["weight_decay"] == 0.0


def test_an_older_state_loads_into_the_optimizer_after_a_graft(kind: Callable[[], Run]) -> None:
    run, alone = kind(), kind()
    older = copy.deepcopy(run.optimizer.state_dict())
    run.go(2)
    hold_still(run.graft())
    run.go(2)
    alone.go(4)
    for side in (run, alone):
        side.optimizer.load_state_dict(copy.deepcopy(older))
        side.go(2)
    assert same(look_of(run), look_of(alone))


def test_a_state_that_was_saved_with_a_graft_loads_into_a_fresh_optimizer(
    kind: Callable[[], Run],
) -> None:
    run, fresh = kind(), kind()
    run.graft()
    run.go(2)
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    fresh.optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert same(fresh.optimizer.state_dict(), run.optimizer.state_dict())
    fresh.go(2)


@pytest.mark.parametrize("name", ["momentum", "adamw_foreach", "schedule_free"])
def test_the_users_own_group_joins_after_a_graft(name: str) -> None:
    run = run_of(OPTIMIZERS[name])
    enter_training(run.optimizer)
    run.go(BEFORE)
    receipt = run.graft()
    extra = nn.Parameter(torch.ones(3))
    run.optimizer.add_param_group({"params": [extra], "lr": 0.5})
    run.go(AFTER)
    assert [len(group["params"]) for group in run.optimizer.param_groups] == [6, 1]
    (own,) = companions_of(run.optimizer)[0].optimizer.param_groups
    assert own["lr"] < 0.05  # not the new group's
    assert receipt.present


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda o: pickle.loads(pickle.dumps(o)),  # noqa: S301
        lambda o: torch.load(saved(o), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch_save"],
)
@pytest.mark.parametrize("name", ["momentum", "adamw_fused", "prodigy", "schedule_free"])
def test_a_copy_of_the_optimizer_has_no_companion(
    name: str, copied: Callable[[torch.optim.Optimizer], torch.optim.Optimizer]
) -> None:
    run = run_of(OPTIMIZERS[name])
    enter_training(run.optimizer)
    run.go(BEFORE)
    receipt = run.graft()
    run.step()
    weights = [p.detach().clone() for p in receipt.graft.parameters()]
    other = copied(run.optimizer)
    assert companions_of(other) == ()
    assert same(other.state_dict(), run.optimizer.state_dict())
    other.step()
    for parameter, before in zip(receipt.graft.parameters(), weights, strict=True):
        assert torch.equal(parameter, before)
    assert len(companions_of(run.optimizer)) == 1


def saved(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file
