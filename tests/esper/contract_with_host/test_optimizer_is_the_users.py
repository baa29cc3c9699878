"""D4: the user's optimizer and schedulers work on as if no graft had come.

Every kind trains the same model twice: alone, and with a graft that it does not know of. The graft
is identity at birth and its weights are held still, so the host's numbers must be equal to the bit.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import prodigyopt
import pytest
import schedulefree
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedules
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

import esper
from esper.grafting import Receipt, companions_of
from esper.grafting.companions.companion import WARMUP_STEPS

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
        "attributes": sorted(vars(run.optimizer).keys() - {"train", "eval"}),
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


@pytest.mark.cover(values=1)
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


# -- gradients --------------------------------------------------------------------------------


@dataclass
class Loop:
    """A training loop over one or several optimizers, which it treats alike."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    scaler: Any = None
    before_step: Callable[[], None] = lambda: None

    def backward(self, number: int, factor: float = 1.0) -> None:
        loss = factor * loss_of(self.model, number)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self) -> None:
        self.before_step()
        for optimizer in self.optimizers:
            optimizer.step() if self.scaler is None else self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()

    def zero(self, **options: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(**options)

    def held(self) -> list[nn.Parameter]:
        return [p for o in self.optimizers for group in o.param_groups for p in group["params"]]


def zero_first(loop: Loop, number: int) -> None:
    loop.zero()
    loop.backward(number)
    loop.step()


def zero_last(loop: Loop, number: int) -> None:
    loop.backward(number)
    loop.step()
    loop.zero()


def zero_in_place_first(loop: Loop, number: int) -> None:
    loop.zero(set_to_none=False)
    loop.backward(number)
    loop.step()


def zero_in_place_last(loop: Loop, number: int) -> None:
    loop.backward(number)
    loop.step()
    loop.zero(set_to_none=False)


def zero_between_forward_and_backward(loop: Loop, number: int) -> None:
    loss = loss_of(loop.model, number)
    loop.zero()
    loss.backward()
    loop.step()


def zero_the_model(loop: Loop, number: int) -> None:
    loop.model.zero_grad()
    loop.backward(number)
    loop.step()


def zero_by_hand(loop: Loop, number: int) -> None:
    for parameter in loop.held():
        parameter.grad = None
    loop.backward(number)
    loop.step()


def zero_by_hand_in_place(loop: Loop, number: int) -> None:
    loop.backward(number)
    loop.step()
    for parameter in loop.held():
        if parameter.grad is not None:
            parameter.grad.zero_()


def accumulated(loop: Loop, number: int) -> None:
    loop.zero()
    for part in range(3):
        loop.backward(10 * number + part)
    loop.step()


def accumulated_in_place(loop: Loop, number: int) -> None:
    for part in range(3):
        loop.backward(10 * number + part)
    loop.step()
    loop.zero(set_to_none=False)


def kept_over_two_steps(loop: Loop, number: int) -> None:
    if number % 2:
        loop.zero()
    loop.backward(number)
    loop.step()


def stepped_twice(loop: Loop, number: int) -> None:
    loop.zero()
    loop.backward(number)
    loop.step()
    loop.step()


def batch_thrown_away(loop: Loop, number: int) -> None:
    loop.backward(number)
    loop.step()
    loop.zero()
    loop.backward(number + 50)
    loop.zero()


def other_loss_between(loop: Loop, number: int) -> None:
    """As the generator's loss goes through the discriminator."""
    loop.backward(number + 70)
    loop.zero()
    loop.backward(number)
    loop.step()


def frozen_for_another_loss(loop: Loop, number: int) -> None:
    """As Lightning toggles optimizers: the tensors of this one rest in the other's pass."""
    held = loop.held()
    for parameter in held:
        parameter.requires_grad_(False)
    x, _ = batch(number)
    loop.model(x.requires_grad_()).sum().backward()
    for parameter in held:
        parameter.requires_grad_(True)
    loop.backward(number)
    loop.step()
    loop.zero()


def sometimes_without_the_layer(loop: Loop, number: int) -> None:
    loop.zero()
    if number % 2:
        x, _ = batch(number)
        loop.model[4](torch.tanh(loop.model[0](x)[:, :8])).sum().backward()
        nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)
    else:
        loop.backward(number)
    loop.step()


def clipped(loop: Loop, number: int) -> None:
    loop.zero()
    loop.backward(number)
    nn.utils.clip_grad_norm_(loop.model.parameters(), 0.05)
    loop.step()


def with_created_graph(loop: Loop, number: int) -> None:
    loop.zero()
    loss = loss_of(loop.model, number)
    (slope,) = torch.autograd.grad(loss, [loop.model[0].weight], create_graph=True)
    (loss + slope.square().sum()).backward()
    loop.step()


def checkpointed(loop: Loop, number: int) -> None:
    """Passes inside of a pass; the grafted layer runs in two of them, and once outside."""
    loop.zero()
    x, y = batch(number)
    first, middle, last = loop.model[:2], loop.model[2:4], loop.model[4]
    h = checkpoint(middle, first(x), use_reentrant=True)
    h = checkpoint(middle, h, use_reentrant=True)
    F.mse_loss(last(middle(h)), y).backward()
    loop.step()


def raised_in_backward(loop: Loop, number: int) -> None:
    loop.zero()
    handle = loop.model[0].weight.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.backward(number + 90)
    handle.remove()
    loop.zero()
    loop.backward(number)
    loop.step()


LOOPS: dict[str, Callable[[Loop, int], None]] = {
    loop.__name__: loop
    for loop in (
        zero_first,
        zero_last,
        zero_in_place_first,
        zero_in_place_last,
        zero_between_forward_and_backward,
        zero_the_model,
        zero_by_hand,
        zero_by_hand_in_place,
        accumulated,
        accumulated_in_place,
        kept_over_two_steps,
        stepped_twice,
        batch_thrown_away,
        other_loss_between,
        frozen_for_another_loss,
        sometimes_without_the_layer,
        clipped,
        with_created_graph,
        checkpointed,
        raised_in_backward,
    )
}


def kept_by_hand(run: Run, receipt: Receipt) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """An optimizer that a user would make for the graft, and what sets its rate before a step."""
    for companion in companions_of(run.optimizer):
        companion.leave()
    (group,) = run.optimizer.param_groups
    names = inspect.signature(type(run.optimizer)).parameters
    options = {key: value for key, value in run.optimizer.defaults.items() if key in names}
    own = type(run.optimizer)(receipt.graft.parameters(), **options)
    taken = [0]

    def warm() -> None:
        taken[0] += 1
        own.param_groups[0].update(lr=group["lr"] * (taken[0] / WARMUP_STEPS), weight_decay=0.0)

    return own, warm


def grafted_run(make: Callable[[Any], torch.optim.Optimizer]) -> tuple[Run, Receipt]:
    run = run_of(make)
    run.go(BEFORE)
    run.optimizer.zero_grad()
    return run, run.graft()


def weights_of(run: Run) -> list[Tensor]:
    return [parameter.detach() for parameter in run.model.parameters()]


@pytest.mark.cover(values=1)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("name", ["momentum", "adamw_foreach"])
def test_a_graft_learns_as_in_an_optimizer_of_the_users_own(
    name: str, loop: Callable[[Loop, int], None]
) -> None:
    run, _ = grafted_run(OPTIMIZERS[name])
    reference, receipt = grafted_run(OPTIMIZERS[name])
    own, warm = kept_by_hand(reference, receipt)
    mine = Loop(run.model, [run.optimizer])
    theirs = Loop(reference.model, [reference.optimizer, own], before_step=warm)
    for number in range(6):
        loop(mine, number)
        loop(theirs, number)
        assert same(weights_of(run), weights_of(reference)), f"in round {number}"


def test_no_gradient_is_left_after_the_loop_has_cleared_them() -> None:
    run, receipt = grafted_run(OPTIMIZERS["momentum"])
    for number in range(3):
        loss_of(run.model, number).backward()
        assert all(p.grad is not None for p in receipt.graft.parameters())
        run.optimizer.step()
        assert all(p.grad is not None for p in receipt.graft.parameters())
        run.optimizer.zero_grad()
        assert all(p.grad is None for p in run.model.parameters())


# -- scalers ----------------------------------------------------------------------------------


def scaled(loop: Loop, number: int) -> None:
    zero_first(loop, number)


def scaled_and_clipped(loop: Loop, number: int) -> None:
    loop.zero()
    loop.backward(number)
    for optimizer in loop.optimizers:
        loop.scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(loop.model.parameters(), 0.05)
    loop.step()


def scaled_and_accumulated(loop: Loop, number: int) -> None:
    loop.zero(set_to_none=False)
    for part in range(3):
        loop.backward(10 * number + part)
    loop.step()


def scaled_with_infinities(loop: Loop, number: int) -> None:
    loop.zero()
    loop.backward(number, factor=float("inf") if number % 3 == 1 else 1.0)
    loop.step()


def left_out_by_hand(loop: Loop, number: int) -> None:
    """The scaler is there, and this optimizer does not go through it."""
    loop.zero()
    scaler, loop.scaler = loop.scaler, None
    loop.backward(number)
    loop.step()
    loop.scaler = scaler


@pytest.mark.cover(values=2)
@pytest.mark.parametrize("named", [True, False], ids=["named", "not_named"])
@pytest.mark.parametrize(
    "loop",
    [scaled, scaled_and_clipped, scaled_and_accumulated, scaled_with_infinities, left_out_by_hand],
    ids=lambda loop: loop.__name__,
)
@pytest.mark.parametrize("name", ["momentum", "adamw_foreach", "adamw_fused"])
def test_a_scaler_unscales_and_skips_for_the_graft_too(
    name: str, loop: Callable[[Loop, int], None], named: bool
) -> None:
    def begin() -> tuple[Run, Receipt, Any]:
        run = run_of(OPTIMIZERS[name])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        session = esper.attach(
            run.model, run.optimizer, scaler=scaler if named else None, verbose=False
        )
        warm_up = Loop(run.model, [run.optimizer], scaler)
        for number in range(BEFORE):
            loop(warm_up, number)
            session.step()
        run.optimizer.zero_grad()
        return run, session.graft("2", "mlp_gelu_2048"), scaler

    run, _, scaler = begin()
    reference, receipt, other_scaler = begin()
    own, warm = kept_by_hand(reference, receipt)
    mine = Loop(run.model, [run.optimizer], scaler)
    theirs = Loop(reference.model, [reference.optimizer, own], other_scaler)

    def warm_unless_skipped() -> None:
        gradients = [p.grad for p in theirs.held() if p.grad is not None]
        if all(gradient.isfinite().all() for gradient in gradients):
            warm()

    theirs.before_step = warm_unless_skipped
    for number in range(6):
        loop(mine, number)
        loop(theirs, number)
        assert same(weights_of(run), weights_of(reference)), f"in round {number}"
        assert scaler.get_scale() == other_scaler.get_scale()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_in_the_graft_alone_does_no_harm(
    value: float, clip: bool
) -> None:
    run, receipt = grafted_run(OPTIMIZERS["adamw_foreach"])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    loop = Loop(run.model, [run.optimizer], scaler)
    step = scaled_and_clipped if clip else scaled
    step(loop, 0)
    graft = list(receipt.graft.parameters())
    before, start = [p.detach().clone() for p in graft], weights_of(run)[0].clone()
    handle = graft[0].register_hook(lambda gradient: torch.full_like(gradient, value))
    hooks = graft[0]._backward_hooks
    for key in [key for key in hooks if key != handle.id]:
        hooks[key] = hooks.pop(key)  # the new hook comes first, as if the layer had made the value
    step(loop, 1)
    assert same([p.detach() for p in graft], before)
    assert all(weight.isfinite().all() for weight in weights_of(run))
    assert not torch.equal(weights_of(run)[0], start)
    handle.remove()
    step(loop, 2)
    assert not same([p.detach() for p in graft], before)


# -- steps ------------------------------------------------------------------------------------


class CallsItsParent(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class SharpnessAware(torch.optim.Optimizer):
    """Steps with the gradients of a neighbouring point (SAM, arXiv 2010.01412), as published."""

    def __init__(self, params: Any, base: Any, **options: Any) -> None:
        super().__init__(params, {"rho": 0.05, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.state[p]["away"] = 0.05 * p.grad
            p.add_(self.state[p]["away"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.sub_(self.state[p]["away"])
        self.base_optimizer.step()
        self.zero_grad()


def test_a_step_counts_once_where_a_class_calls_its_parents() -> None:
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1).step()  # now the parent's has hooks too
    run, _ = grafted_run(lambda p: CallsItsParent(p, lr=0.05))
    (companion,) = companions_of(run.optimizer)
    run.go(3)
    assert companion.optimizer.param_groups[0]["esper_steps"] == 3


def test_a_graft_beside_a_sharpness_aware_optimizer_learns() -> None:
    model = model_of_a_seed()
    optimizer = SharpnessAware(model.parameters(), torch.optim.SGD, lr=0.05)
    receipt = esper.graft(model, "2", "mlp_gelu_2048", optimizer=optimizer)
    start = [p.detach().clone() for p in receipt.graft.parameters()]
    for number in range(4):
        loss_of(model, number).backward()
        optimizer.first_step()
        loss_of(model, number).backward()
        optimizer.second_step()
    (companion,) = companions_of(optimizer)
    assert isinstance(companion.optimizer, torch.optim.SGD)
    assert not companion.note
    assert not any(
        torch.equal(p, before) for p, before in zip(receipt.graft.parameters(), start, strict=True)
    )


def test_a_closure_is_called_as_often_as_without_the_graft() -> None:
    run, receipt = grafted_run(OPTIMIZERS["momentum"])
    calls = []

    def closure() -> Tensor:
        run.optimizer.zero_grad()
        loss = loss_of(run.model, len(calls))
        loss.backward()
        calls.append(loss.item())
        return loss

    start = [p.detach().clone() for p in receipt.graft.parameters()]
    for _ in range(3):
        run.optimizer.step(closure)
    assert len(calls) == 3
    assert not same([p.detach() for p in receipt.graft.parameters()], start)


# -- classes that cannot train every tensor ---------------------------------------------------

RIGID: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.02),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=1.0, max_iter=2),
    "sparse_adam": lambda p: torch.optim.SparseAdam(list(p), lr=1e-4),
}


@pytest.mark.parametrize("name", RIGID)
def test_what_a_class_cannot_train_gets_a_plain_adamw_which_says_so(name: str) -> None:
    model = model_of_a_seed()
    optimizer = RIGID[name](model.parameters())
    schedule = schedules.LambdaLR(optimizer, lambda step: 0.5**step)
    session = esper.attach(model, optimizer, verbose=False)
    loss_of(model, 0)
    session.step()
    receipt = session.graft("2", "mlp_gelu_2048")
    (companion,) = companions_of(optimizer)
    assert type(companion.optimizer) is torch.optim.AdamW
    own = companion.optimizer.param_groups[0]
    assert own["lr"] == min(1e-3, optimizer.param_groups[0]["lr"])
    (finding,) = [f for f in session.findings() if "AdamW" in f.observed]
    assert finding.layer == "2"
    assert finding.severity == "info"
    assert type(optimizer).__name__ in finding.observed
    rates = []
    for number in range(3):
        closure = partial(closure_of, model, optimizer, number)
        closure()
        if name == "sparse_adam":  # its own step needs sparse gradients, which the model lacks
            optimizer.zero_grad(set_to_none=True)
        optimizer.step(closure) if name == "lbfgs" else optimizer.step()
        rates.append(own["lr"] / (number + 1))
        schedule.step()
    assert rates[1] == pytest.approx(rates[0] / 2)
    assert rates[2] == pytest.approx(rates[0] / 4)
    session.undo(receipt)
    assert companions_of(optimizer) == ()


def closure_of(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(model, number)
    loss.backward()
    return loss


@pytest.mark.parametrize("name", ["schedule_free", "schedule_free_sgd"])
def test_evaluation_sees_the_averaged_weights_of_a_graft(name: str) -> None:
    run = run_of(OPTIMIZERS[name])
    enter_training(run.optimizer)
    run.go(BEFORE)
    receipt = run.graft()
    run.go(AFTER)
    trained = [p.detach().clone() for p in receipt.graft.parameters()]
    run.optimizer.eval()
    (companion,) = companions_of(run.optimizer)
    assert companion.optimizer.param_groups[0]["train_mode"] is False
    assert not same([p.detach() for p in receipt.graft.parameters()], trained)
    run.optimizer.train()
    for parameter, before in zip(receipt.graft.parameters(), trained, strict=True):
        torch.testing.assert_close(parameter.detach(), before)
    run.go(2)
    receipt.undo(hard=False)
    assert not {"train", "eval"} & vars(run.optimizer).keys()


def test_muon_for_matrices_beside_adamw_for_the_rest() -> None:
    model = model_of_a_seed()
    muon = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=0.02)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.dim() != 2], lr=3e-4)
    session = esper.attach(model, [muon, adamw], verbose=False)
    loss_of(model, 0)
    session.step()
    matrices, mixed = session.graft("0", "proj_lora_64"), session.graft("2", "mlp_gelu_2048")
    (first,), (second,) = companions_of(muon), companions_of(adamw)
    assert type(first.optimizer) is torch.optim.Muon
    assert type(second.optimizer) is torch.optim.AdamW
    assert second.optimizer.param_groups[0]["lr"] == 3e-4
    assert "Muon cannot train these weights" in second.note
    weights = [*matrices.graft.parameters(), *mixed.graft.parameters()]
    start = [p.detach().clone() for p in weights]
    loop = Loop(model, [muon, adamw])
    for number in range(3):
        zero_first(loop, number)
    assert not any(torch.equal(p, before) for p, before in zip(weights, start, strict=True))


STEP_GROWS = {"sgd", "momentum", "nesterov", "schedule_free_sgd"}


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "prodigy"])
def test_a_low_rank_graft_steps_no_farther_than_its_layer_whatever_the_optimizer(name: str) -> None:
    run = run_of(OPTIMIZERS[name])
    enter_training(run.optimizer)
    run.go(BEFORE)
    receipt = esper.graft(run.model, "2", "proj_lora_64", optimizer=run.optimizer, rank=2)
    (companion,) = companions_of(run.optimizer)
    used = run.optimizer.param_groups[0]["lr"]
    run.step()
    expected = used / WARMUP_STEPS
    if name in STEP_GROWS:
        assert receipt.graft.amplification**2 == pytest.approx(128)
        expected /= 128
    assert companion.optimizer.param_groups[0]["lr"] == pytest.approx(expected)
