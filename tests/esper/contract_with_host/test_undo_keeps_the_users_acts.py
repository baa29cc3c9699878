"""D5: an undo takes back the graft and its effect, not what the script has done since."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import esper
from esper import Session
from esper.grafting import digest
from esper.grafting.tensors.saved_values import same_tree, save_tree

LAYER, BLUEPRINT = "body", "proj_lora_64"


class Model(nn.Module):
    """A frozen stem, a body with running statistics, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.body = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)
        self.stem.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.norm(self.body(self.stem(x)))))
        return y


@dataclass
class Loop:
    """A script's loop, attached."""

    model: Model
    optimizer: torch.optim.Optimizer
    scheduler: Any
    session: Session
    steps: int = 0

    def run(self, steps: int) -> list[float]:
        return [self.step() for _ in range(steps)]

    def step(self) -> float:
        generator = torch.Generator().manual_seed(self.steps % 7)
        self.steps += 1
        weight = self.model.head.weight
        x = torch.randn(16, 6, generator=generator).to(weight)
        loss = F.cross_entropy(self.model(x), torch.randint(3, (16,), generator=generator))
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.session.step(loss)
        return loss.item()

    @property
    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]


Schedule = Callable[[torch.optim.Optimizer], Any]


def start(
    schedule: Schedule | None = None,
    *,
    named: bool = True,
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW,
    **settings: Any,
) -> Loop:
    torch.manual_seed(0)
    model = Model()
    trained = [p for p in model.parameters() if p.requires_grad]
    make: Any = kind
    optimizer = make(trained, **{"lr": 0.01, **settings})
    scheduler = None if schedule is None else schedule(optimizer)
    session = esper.attach(model, optimizer, scheduler=scheduler if named else None)
    return Loop(model, optimizer, scheduler, session)


def plain(loop: Loop) -> None:
    """Nothing: what the other acts are compared with."""


def values(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


# -- the script's acts ---------------------------------------------------------------------------


def thaw(loop: Loop) -> None:
    loop.model.stem.requires_grad_(True)
    loop.optimizer.add_param_group({"params": list(loop.model.stem.parameters()), "lr": 1e-4})


def freeze(loop: Loop) -> None:
    loop.model.norm.requires_grad_(False)


def lower_rate(loop: Loop) -> None:
    for group in loop.optimizer.param_groups:
        group["lr"] *= 0.1


def change_decay(loop: Loop) -> None:
    loop.optimizer.param_groups[0]["weight_decay"] = 0.3


def name_group(loop: Loop) -> None:
    loop.optimizer.param_groups[0]["name"] = "all"


def regroup(loop: Loop) -> None:
    """Moves the head into a group of its own, with its state."""
    head = list(loop.model.head.parameters())
    own = set(map(id, head))
    group = loop.optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if id(p) not in own]
    loop.optimizer.add_param_group({"params": head, "lr": 0.02})


def leave_out(loop: Loop) -> None:
    """Takes the norm out of the optimizer."""
    own = {id(p) for p in loop.model.norm.parameters()}
    group = loop.optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if id(p) not in own]
    for parameter in loop.model.norm.parameters():
        loop.optimizer.state.pop(parameter, None)


def double(loop: Loop) -> None:
    loop.model.double()
    loop.optimizer.state.clear()


def half_precision(loop: Loop) -> None:
    loop.model.to(torch.bfloat16)
    loop.optimizer.state.clear()


def replace_head(loop: Loop) -> None:
    loop.model.head = nn.Linear(8, 3)
    loop.optimizer.add_param_group({"params": list(loop.model.head.parameters())})


def replace_weight(loop: Loop) -> None:
    loop.model.head.bias = nn.Parameter(torch.ones(3))
    loop.optimizer.add_param_group({"params": [loop.model.head.bias]})


def tie(loop: Loop) -> None:
    loop.model.body.weight = loop.model.stem.weight = nn.Parameter(torch.eye(8)[:, :8])


def register_buffer(loop: Loop) -> None:
    loop.model.body.register_buffer("mask", torch.ones(8))


def load_weights(loop: Loop) -> None:
    state = {
        name: torch.full_like(tensor, 0.25) if tensor.is_floating_point() else tensor
        for name, tensor in loop.model.head.state_dict().items()
    }
    loop.model.head.load_state_dict(state)


def reset_momentum(loop: Loop) -> None:
    loop.optimizer.state.clear()


def load_optimizer(loop: Loop) -> None:
    state = loop.optimizer.state_dict()
    for entry in state["state"].values():
        entry["exp_avg"] = torch.full_like(entry["exp_avg"], 0.5)
    state["param_groups"][0]["lr"] = 0.005
    loop.optimizer.load_state_dict(state)


@dataclass(frozen=True)
class Act:
    """Something that a script does, how it looks afterwards, and what the receipt calls it."""

    do: Callable[[Loop], None]
    holds: Callable[[Loop], bool]
    told: str = ""
    exact: bool = True


def group_of(loop: Loop, parameter: Tensor) -> int:
    groups = loop.optimizer.param_groups
    return next((i for i, g in enumerate(groups) if any(p is parameter for p in g["params"])), -1)


def has_no_old_moments(loop: Loop) -> bool:
    return not loop.optimizer.state


ACTS = {
    "thaws a layer and adds its group": Act(
        thaw,
        lambda s: s.model.stem.weight.requires_grad and group_of(s, s.model.stem.weight) == 1
        and s.rates == [0.01, 1e-4] and bool(s.optimizer.state[s.model.stem.weight]),
        "parameter group added: stem.weight, stem.bias",
    ),
    "freezes a layer": Act(
        freeze, lambda s: not s.model.norm.weight.requires_grad, "requires_grad=False: norm.weight"
    ),
    "lowers the rate": Act(lower_rate, lambda s: s.rates == [0.01 * 0.1], "lr of parameter group"),
    "changes the weight decay": Act(
        change_decay, lambda s: s.optimizer.param_groups[0]["weight_decay"] == 0.3, "weight_decay"
    ),
    "names a group": Act(
        name_group, lambda s: s.optimizer.param_groups[0].get("name") == "all", "name of"
    ),
    "moves a layer to a group of its own": Act(
        regroup,
        lambda s: group_of(s, s.model.head.weight) == 1 and s.rates == [0.01, 0.02]
        and bool(s.optimizer.state[s.model.head.weight]),
        "parameter group added: head.weight",
    ),
    "takes a layer out of the optimizer": Act(
        leave_out,
        lambda s: group_of(s, s.model.norm.weight) == -1
        and s.model.norm.weight not in s.optimizer.state,
        "taken out of parameter group 0: norm.weight",
    ),
    "trains on in double": Act(
        double, lambda s: s.model.head.weight.dtype is torch.float64, "dtype torch.float64", False
    ),
    "trains on in bfloat16": Act(
        half_precision,
        lambda s: s.model.norm.running_mean.dtype is torch.bfloat16,
        "dtype torch.bfloat16",
        False,
    ),
    "replaces the head": Act(
        replace_head,
        lambda s: group_of(s, s.model.head.weight) == 1,
        "parameter group added",
        False,
    ),
    "replaces a parameter": Act(
        replace_weight, lambda s: group_of(s, s.model.head.bias) == 1, "bias of a Linear", False
    ),
    "registers a buffer": Act(
        register_buffer, lambda s: "mask" in s.model.body._buffers, "buffer registered: mask", False
    ),
    "loads weights": Act(
        load_weights,
        lambda s: bool((s.model.head.weight == 0.25).all() and (s.model.head.bias == 0.25).all()),
        "weights that the script has loaded: 2 tensors",
        False,
    ),
    "resets the momentum": Act(reset_momentum, has_no_old_moments, "in the optimizer: reset"),
    "loads an optimizer's state": Act(
        load_optimizer,
        lambda s: s.rates == [0.005]
        and bool((s.optimizer.state[s.model.head.weight]["exp_avg"] == 0.5).all()),
        "as the script has loaded it",
    ),
}  # fmt: skip


@pytest.mark.cover(values=1)
@pytest.mark.parametrize("guarded", [False, True], ids=["by hand", "by the guard"])
@pytest.mark.parametrize("name", ACTS)
def test_what_the_script_did_since_the_graft_stays(name: str, guarded: bool) -> None:
    act, loop = ACTS[name], start()
    loop.run(12)
    before = values(loop.model)
    receipt = loop.session.graft(LAYER, BLUEPRINT)
    loop.run(3)
    act.do(loop)
    loop.run(4)

    if guarded:
        loop.session.step(math.nan)
    else:
        undone = loop.session.undo(receipt)
        assert undone.exact is act.exact
        assert act.told in "; ".join(undone.kept)

    assert not receipt.present
    assert act.holds(loop)
    told = [f.observed for f in loop.session.findings() if "the undo of" in f.observed]
    assert len(told) == 1
    assert act.told in told[0]
    after = values(loop.model)
    untouched = ["body.weight", "body.bias", "norm.running_mean"]
    assert all(torch.equal(after[n], before[n].to(after[n])) for n in untouched)
    losses = loop.run(5)
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("name", ACTS)
def test_a_second_act_before_a_second_graft_stays_too(name: str) -> None:
    """Esper's own changes in between are not taken for the script's."""
    act, loop = ACTS[name], start()
    loop.run(12)
    receipt = loop.session.graft(LAYER, BLUEPRINT)
    act.do(loop)
    if loop.model.head.weight.dtype is torch.float32:
        loop.session.graft("head", "proj_ia3")
        loop.session.freeze("head")
    loop.run(3)
    loop.session.undo(receipt)
    assert act.holds(loop)
    assert loop.model.head.weight.requires_grad, "the remedy went with the graft"
    loop.run(3)


def test_without_an_act_of_the_script_everything_is_as_before() -> None:
    loop = start()
    loop.run(12)
    receipt = loop.session.graft(LAYER, BLUEPRINT)
    loop.run(5)
    undone = loop.session.undo(receipt)
    assert undone.exact
    assert undone.kept == undone.not_restored == ()
    assert undone.digest == receipt.digest_before == digest(loop.model)
    assert "the undo of" not in str(loop.session.findings())


def test_what_could_not_be_restored_is_named() -> None:
    loop = start()
    loop.run(12)
    receipt = loop.session.graft(LAYER, BLUEPRINT)
    replace_head(loop)
    loop.run(2)
    undone = loop.session.undo(receipt)
    assert undone.not_restored == ("values of head.weight, head.bias: they stay as they are now",)
    assert undone.digest == digest(loop.model)
    assert "head.weight" in str(undone)


def write_data(weight: nn.Parameter) -> None:
    weight.data.copy_(torch.full_like(weight, 0.1))


def write_without_grad(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(2.0)


def set_data(weight: nn.Parameter) -> None:
    weight.data = torch.full_like(weight, 0.1)


WRITES: tuple[Callable[[nn.Parameter], object], ...] = (
    write_data,
    write_without_grad,
    set_data,
    nn.init.zeros_,
)


@pytest.mark.parametrize("write", WRITES)
def test_numbers_that_the_script_has_written_are_taken_back_and_named(
    write: Callable[[nn.Parameter], object],
) -> None:
    """Into weights that nothing trains: nobody else can have changed them."""
    loop = start()
    loop.run(12)
    before = values(loop.model)["stem.weight"]
    receipt = loop.session.graft(LAYER, BLUEPRINT)
    loop.run(2)
    write(loop.model.stem.weight)
    loop.run(2)
    undone = loop.session.undo(receipt)
    assert torch.equal(loop.model.stem.weight, before)
    assert undone.exact
    assert undone.rewound == ("values of stem.weight",)
    assert any("has written: values of stem.weight" in str(f) for f in loop.session.findings())


def test_what_training_has_changed_or_the_script_has_loaded_is_not_named_as_written() -> None:
    loop = start()
    loop.run(12)
    receipt = loop.session.graft(LAYER, BLUEPRINT)
    thaw(loop)
    loop.run(2)
    assert loop.session.undo(receipt).rewound == ()
    receipt = loop.session.graft(LAYER, BLUEPRINT)
    loaded = {name: value + 1 for name, value in loop.model.stem.state_dict().items()}
    loop.model.stem.requires_grad_(False).load_state_dict(loaded)
    loop.run(2)
    assert loop.session.undo(receipt).rewound == ()
    assert torch.equal(loop.model.stem.weight, loaded["weight"])


def test_a_moment_that_is_not_finite_does_not_stay() -> None:
    """A layer thawed since the graft, and a blow-up that reached its moments."""
    loop = start()
    loop.run(12)
    receipt = loop.session.graft(LAYER, BLUEPRINT)
    thaw(loop)
    loop.run(2)
    loop.optimizer.state[loop.model.stem.weight]["exp_avg"].fill_(math.nan)
    loop.session.undo(receipt)
    assert loop.model.stem.weight not in loop.optimizer.state
    assert all(map(math.isfinite, loop.run(5)))


# -- rates and schedulers ------------------------------------------------------------------------

SCHEDULES: dict[str, Schedule] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 100),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=100),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [5]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_known_schedule_is_rewound(name: str) -> None:
    loop = start(SCHEDULES[name])
    loop.run(12)
    rates = loop.rates
    receipt = loop.session.graft(LAYER, BLUEPRINT)
    loop.run(6)
    undone = loop.session.undo(receipt)
    assert undone.exact
    assert undone.kept == ()
    assert loop.rates == rates


@pytest.mark.parametrize("name", ["step", "exponential", "cosine"])
def test_a_rate_lowered_beside_a_recursive_schedule_stays_lowered(name: str) -> None:
    loop = start(SCHEDULES[name])
    loop.run(12)
    rates = loop.rates
    receipt = loop.session.graft(LAYER, BLUEPRINT)
    loop.run(2)
    lower_rate(loop)
    loop.run(4)
    undone = loop.session.undo(receipt)
    assert loop.rates == pytest.approx([rate * 0.1 for rate in rates])
    assert "lr of parameter group 0: scaled by 0.1" in undone.kept


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_was_not_named_goes_on(name: str) -> None:
    """An undo cannot rewind it, so the rates stay where it is."""
    loop = start(SCHEDULES[name], named=False)
    loop.run(12)
    receipt = loop.session.graft(LAYER, BLUEPRINT)
    loop.run(6)
    rates = loop.rates
    loop.session.undo(receipt)
    assert loop.rates == rates
    loop.run(5)


def test_a_group_added_with_its_entries_in_a_known_schedule_stays() -> None:
    loop = start(SCHEDULES["lambda"])
    loop.run(12)
    receipt = loop.session.graft(LAYER, BLUEPRINT)
    loop.run(2)
    thaw(loop)
    loop.scheduler.base_lrs.append(1e-4)
    loop.scheduler.lr_lambdas.append(lambda step: 1.0)
    loop.run(3)
    loop.session.undo(receipt)
    assert loop.scheduler.base_lrs == [0.01, 1e-4]
    assert loop.scheduler.last_epoch == 12
    loop.run(3)
    assert loop.rates == pytest.approx([0.01 / 16, 1e-4])


def test_the_directions_of_lbfgs_are_no_reset() -> None:
    """It puts a new tensor into its state at each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    session = esper.attach(model, optimizer, run="lbfgs", mode="supervised", verbose=False)
    x = torch.randn(16, 8)

    def train(steps: int) -> None:
        def closure() -> Any:
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            torch.autograd.backward(loss)
            return loss

        for _ in range(steps):
            session.step(optimizer.step(closure))

    train(4)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    receipt = session.graft("0", "mlp_gelu_2048")
    train(3)
    report = session.undo(receipt)

    assert report.exact
    assert report.kept == ()
    assert same_tree(optimizer.state_dict()["state"], save_tree(before, torch.clone))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_a_reset_of_other_optimizers_stays(kind: type[torch.optim.Optimizer]) -> None:
    settings = {} if kind is torch.optim.Adagrad else {"momentum": 0.9}
    loop = start(kind=kind, **settings)
    loop.run(12)
    receipt = loop.session.graft(LAYER, BLUEPRINT)
    weight = loop.model.body.weight
    if kind is torch.optim.SGD:
        loop.optimizer.state[weight]["momentum_buffer"] = None
    else:
        loop.optimizer.state[weight] = {
            key: torch.zeros_like(value) for key, value in loop.optimizer.state[weight].items()
        }
    loop.run(3)
    undone = loop.session.undo(receipt)
    assert undone.kept == ("state of body.weight in the optimizer: reset",)
    state = loop.optimizer.state.get(weight, {})
    assert all(not value.any() for value in state.values())
    loop.run(3)


class Counting(torch.optim.SGD):
    """Keeps a counter and an estimate in its groups, as Prodigy and schedule-free ones do."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group.update({"k": 0, "d": 1e-6})
        self.defaults.update({"k": 0, "d": 1e-6})

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] += 1
            group["d"] *= 1.1
        return super().step(closure)


def test_counters_that_an_optimizer_keeps_in_its_groups_are_rewound() -> None:
    loop = start(kind=Counting)
    loop.run(12)
    counters = [(group["k"], group["d"]) for group in loop.optimizer.param_groups]
    receipt = loop.session.graft(LAYER, BLUEPRINT)
    loop.run(4)
    assert loop.session.undo(receipt).kept == ()
    assert [(group["k"], group["d"]) for group in loop.optimizer.param_groups] == counters


def test_layers_that_the_script_has_swapped_stay_so_and_are_named() -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)], nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = esper.attach(model, optimizer, mode="supervised", verbose=False)

    def step() -> None:
        loss = model(torch.ones(4, 8)).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss)

    step()
    receipt = session.graft("3", "mlp_gelu_2048")
    first, second = model[1], model[2]
    model[1], model[2] = second, first
    step()
    report = session.undo(receipt)

    assert (model[1], model[2]) == (second, first)
    assert not report.exact
    assert "kept the modules where the script has put them" in str(report)
    step()
