"""Line by line what trains a model: optimizers, schedulers, scaler, accumulation, clipping.

Each is grafted in the middle of a training, goes on, is undone to the bit, and resumes from a
checkpoint to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import esper
from esper import blueprints
from esper.grafting import (
    Receipt,
    Surroundings,
    apply_graft,
    audit,
    companions_of,
    digest,
    trace_layers,
)
from esper.grafting.companions.companion import WARMUP_STEPS
from tests.esper.tiny_models import LENGTH, VOCABULARY, TinyTransformer

LAYER = "blocks.0.wide"
BLUEPRINT = "mlp_gelu_2048"
WARM, GRAFTED, AFTER = 4, 4, 5


class Lion(torch.optim.Optimizer):
    """Sign of a momentum (Chen et al. 2023, arXiv 2302.06675); one state tensor, no step count."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                update = momentum.mul(first).add(parameter.grad, alpha=1 - first).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - second)


def relative_adafactor(params: Any) -> Any:
    return transformers.Adafactor(params, scale_parameter=True, relative_step=True, lr=None)


def factored_adafactor(params: Any) -> Any:
    return transformers.Adafactor(params, scale_parameter=False, relative_step=False, lr=1e-3)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=3e-3, amsgrad=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=3e-3),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "sgd_nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=3e-3),
    "radam": lambda p: torch.optim.RAdam(p, lr=3e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adafactor_factored": factored_adafactor,
    "adafactor_relative": relative_adafactor,
    "lion": Lion,
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adagrad_fused": lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=True),
    "adamw_maximize": lambda p: torch.optim.AdamW(p, lr=3e-4, maximize=True),
    "tensor_lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(3e-3), foreach=False),
    "tensor_lr_fused": lambda p: torch.optim.AdamW(p, lr=torch.tensor(3e-3), fused=True),
}

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.95**step),
    "step": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.5),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=60),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "warm_restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=7), lr_scheduler.CosineAnnealingLR(o, T_max=30)],
        milestones=[7],
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=8), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=30),
    "linear_with_warmup": lambda o: transformers.get_linear_schedule_with_warmup(o, 8, 60),
    "cosine_with_warmup": lambda o: transformers.get_cosine_schedule_with_warmup(o, 8, 60),
    "constant_with_warmup": lambda o: transformers.get_constant_schedule_with_warmup(o, 8),
    "inverse_sqrt": lambda o: transformers.get_inverse_sqrt_schedule(o, 8),
}


@dataclass
class Loop:
    """A user's loop: several optimizers, accumulation, clipping, a scaler, as wanted."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    schedulers: list[Any] = field(default_factory=list)
    scaler: Any = None
    accumulate: int = 1
    clip: float = 0.0
    taken: int = 0
    after_step: Callable[[], None] = lambda: None

    def step(self) -> float:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        total = sum(self._backward() for _ in range(self.accumulate))
        if self.clip:
            self._unscale()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for optimizer in self.optimizers:
            optimizer.step() if self.scaler is None else self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()
        for scheduler in self.schedulers:
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(1.0) if plateau else scheduler.step()
        self.after_step()
        return total

    def run(self, steps: int) -> list[float]:
        return [self.step() for _ in range(steps)]

    def state(self) -> dict[str, Any]:
        """What a user's checkpoint holds beside model and session."""
        return {
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "taken": self.taken,
            "stream": torch.get_rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.taken = state["taken"]
        torch.set_rng_state(state["stream"])

    def _backward(self) -> float:
        generator = torch.Generator().manual_seed(self.taken)
        tokens = torch.randint(0, VOCABULARY, (4, LENGTH + 1), generator=generator)
        self.taken += 1
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / self.accumulate
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.item()

    def _unscale(self) -> None:
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)


def model_of_a_seed() -> TinyTransformer:
    torch.manual_seed(7)
    return TinyTransformer()


def one_optimizer(name: str) -> Loop:
    model = model_of_a_seed()
    return Loop(model, [OPTIMIZERS[name](model.parameters())])


def scheduled(name: str, optimizer: str = "adamw") -> Loop:
    loop = one_optimizer(optimizer)
    loop.schedulers = [SCHEDULERS[name](loop.optimizers[0])]
    return loop


def scaled() -> Loop:
    loop = scheduled("lambda")
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    return loop


def accumulated_and_clipped() -> Loop:
    loop = scaled()
    loop.accumulate, loop.clip = 3, 0.5
    return loop


def two_optimizers() -> Loop:
    model = model_of_a_seed()
    rest = [p for name, p in model.named_parameters() if not name.startswith("blocks.0")]
    first = torch.optim.SGD(rest, lr=0.05, momentum=0.9)
    second = torch.optim.AdamW(
        [
            {"params": model.blocks[0].wide.parameters(), "lr": 1e-4, "weight_decay": 0.3},
            {"params": [p for name, p in model.blocks[0].named_parameters()
                        if not name.startswith("wide")]},
        ],
        lr=3e-3,
    )  # fmt: skip
    schedulers = [SCHEDULERS["step"](first), SCHEDULERS["one_cycle"](second)]
    return Loop(model, [first, second], schedulers)


LOOPS: dict[str, Callable[[], Loop]] = {
    **{name: lambda name=name: one_optimizer(name) for name in OPTIMIZERS},
    **{f"schedule_{name}": lambda name=name: scheduled(name) for name in SCHEDULERS},
    "sgd_one_cycle": lambda: scheduled("one_cycle", "sgd_momentum"),
    "tensor_lr_one_cycle": lambda: scheduled("one_cycle", "tensor_lr"),
    "scaler": scaled,
    "accumulated_and_clipped": accumulated_and_clipped,
    "two_optimizers": two_optimizers,
}


def graft_into(loop: Loop, layer: str = LAYER, blueprint: str = BLUEPRINT) -> Receipt:
    info = next(
        i for i in trace_layers(loop.model, lambda: loop.model(tokens())) if i.name == layer
    )
    return apply_graft(
        loop.model,
        info,
        blueprints.get_blueprint(blueprint),
        surroundings=Surroundings(loop.optimizers, loop.schedulers, loop.scaler),
    )


def tokens() -> Tensor:
    return torch.zeros(4, LENGTH, dtype=torch.long)


@pytest.mark.parametrize("name", LOOPS)
def test_a_graft_trains_on_and_a_hard_undo_is_exact(name: str) -> None:
    unchanged = LOOPS[name]()
    unchanged.run(WARM)
    expected = unchanged.run(AFTER)
    loop = LOOPS[name]()
    loop.run(WARM)
    state = repr(loop.state()["schedulers"]), repr(loop.state()["scaler"])
    taken = loop.taken
    receipt = graft_into(loop)
    start = {key: p.detach().clone() for key, p in receipt.graft.named_parameters()}

    loop.run(GRAFTED)

    for key, parameter in receipt.graft.named_parameters():
        assert not torch.equal(parameter, start[key]), f"{key} does not learn"
        assert parameter.isfinite().all()
    assert audit(loop.model, loop.optimizers) == []
    assert receipt.undo().exact
    assert (repr(loop.state()["schedulers"]), repr(loop.state()["scaler"])) == state
    loop.taken = taken
    assert loop.run(AFTER) == expected
    assert digest(loop.model) == digest(unchanged.model)


@pytest.mark.parametrize("name", LOOPS)
def test_a_checkpoint_with_a_graft_goes_on_to_the_bit(name: str) -> None:
    loop = LOOPS[name]()
    session = attach(loop)
    loop.step()
    session.step(1.0)
    session.graft(LAYER, BLUEPRINT)
    loop.run(GRAFTED)
    saved = session.state_dict(), loop.model.state_dict(), loop.state()
    saved = torch_round_trip(saved)
    expected = loop.run(AFTER)
    session.close()

    resumed = LOOPS[name]()
    again = attach(resumed)
    again.load_state_dict(saved[0])
    resumed.model.load_state_dict(saved[1])
    resumed.load(saved[2])

    assert resumed.run(AFTER) == expected
    assert digest(resumed.model) == digest(loop.model)
    again.close()


def attach(loop: Loop) -> Any:
    return esper.attach(
        loop.model, loop.optimizers, scheduler=loop.schedulers or None, scaler=loop.scaler
    )


def torch_round_trip(state: Any) -> Any:
    """As through a file, read with nothing but tensors and plain values allowed."""
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_new_weights_follow_the_optimizer_and_group_that_train_the_layer() -> None:
    loop = two_optimizers()
    loop.run(2)
    graft_into(loop)
    assert companions_of(loop.optimizers[0]) == ()
    (companion,) = companions_of(loop.optimizers[1])
    used = loop.optimizers[1].param_groups[0]["lr"]
    loop.step()
    (group,) = companion.optimizer.param_groups
    assert group["lr"] == pytest.approx(used / WARMUP_STEPS)
    assert group["weight_decay"] == 0.0


def test_a_step_that_the_scaler_skips_is_no_step_of_the_warm_up() -> None:
    loop = scaled()
    loop.run(WARM)
    graft_into(loop)
    (companion,) = companions_of(loop.optimizers[0])
    (young,) = companion.optimizer.param_groups
    loop.scaler.update(new_scale=float("inf"))
    loop.step()
    assert young["esper_steps"] == 0
    loop.scaler.update(new_scale=2.0)
    loop.step()
    assert young["esper_steps"] == 1
