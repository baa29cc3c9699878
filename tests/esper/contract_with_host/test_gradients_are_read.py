"""D7: gradients are read when they exist, whatever the order of the user's lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper import Session, grafting
from esper.contracts import HealthFrame, LayerInfo, Signal, ViolationRule
from esper.health import HealthSampler, optimizer_steps
from esper.health.pace import SamplingPace
from esper.sdk.findings import FRAMES_WITHOUT_GRADIENTS

Optimizers = list[torch.optim.Optimizer]
Loop = Callable[["Script"], None]

BACKWARD, STEP, ZERO, SESSION = "backward", "step", "zero_grad", "session"
ORDERS = {
    "zero_grad first": (ZERO, BACKWARD, STEP, SESSION),
    "zero_grad after backward's use": (BACKWARD, STEP, ZERO, SESSION),
    "session before zero_grad": (BACKWARD, STEP, SESSION, ZERO),
    "session before the step": (BACKWARD, SESSION, STEP, ZERO),
    "session first": (SESSION, BACKWARD, STEP, ZERO),
    "session after zero_grad, then the step": (ZERO, SESSION, BACKWARD, STEP),
}


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


OPTIMIZERS: dict[str, Callable[[nn.Sequential], Optimizers]] = {
    "sgd": lambda m: [torch.optim.SGD(m.parameters(), 1e-2)],
    "adamw foreach": lambda m: [torch.optim.AdamW(m.parameters(), 1e-3, foreach=True)],
    "adamw fused": lambda m: [torch.optim.AdamW(m.parameters(), 1e-3, fused=True)],
    "adamw capturable name": lambda m: [torch.optim.AdamW(m.named_parameters(), 1e-3)],
    "lbfgs": lambda m: [torch.optim.LBFGS(m.parameters(), 1e-2, max_iter=2)],
    "adafactor": lambda m: [torch.optim.Adafactor(m.parameters(), 1e-3)],
    "two": lambda m: [
        torch.optim.SGD(m[0].parameters(), 1e-2),
        torch.optim.AdamW(m[2].parameters(), 1e-3),
    ],
}


class Script:
    """A user's loop; each part is a line of it."""

    def __init__(self, optimizers: str = "sgd") -> None:
        self.model = net()
        self.optimizers = OPTIMIZERS[optimizers](self.model)
        self.data = torch.Generator().manual_seed(3)
        self.seen: list[HealthFrame] = []
        self.norms: dict[int, float] = {}
        self.steps = 0
        self.with_loss = True

    def attach(self, **options: object) -> Session:
        self.session = esper.attach(self.model, self.optimizers, **options)  # type: ignore[arg-type]
        return self.session

    def loss(self) -> Tensor:
        x = torch.randn(16, 8, generator=self.data)
        return F.cross_entropy(self.model(x), x[:, :4].argmax(1))

    def backward(self) -> None:
        self.last = self.loss()
        torch.autograd.backward(self.last)

    def zero(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                optimizer.step(self.closure)
            else:
                optimizer.step()
        self.steps += 1
        self.norms[self.steps] = self.norm("0")

    def closure(self) -> float:
        self.zero()
        self.backward()
        return self.last.item()

    def norm(self, layer: str) -> float:
        grads = [p.grad for p in self.model.get_submodule(layer).parameters()]
        return math.sqrt(sum(float(g.square().sum()) for g in grads if g is not None))

    def tell(self) -> None:
        if self.with_loss and hasattr(self, "last"):
            self.session.step(self.last)
        else:
            self.session.step()
        frame = self.session.frame()
        if frame is not None and (not self.seen or self.seen[-1] is not frame):
            self.seen.append(frame)

    def run(self, order: tuple[str, ...], steps: int = 32) -> list[HealthFrame]:
        lines = {BACKWARD: self.backward, STEP: self.step, ZERO: self.zero, SESSION: self.tell}
        for _, line in product(range(steps), order):
            lines[line]()
        return self.seen


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def known(frame: HealthFrame, signal: Signal = Signal.GRAD_NORM) -> bool:
    return bool(np.isfinite(frame.column(signal)[[0, -1]]).all())


@pytest.mark.parametrize("optimizers", OPTIMIZERS)
@pytest.mark.parametrize("order", ORDERS)
def test_gradients_are_known_in_every_order_of_lines(order: str, optimizers: str) -> None:
    script = Script(optimizers)
    with script.attach():
        frames = script.run(ORDERS[order])

    assert len(frames) >= 2
    for frame in frames:
        assert known(frame)
        assert known(frame, Signal.UPDATE_RATIO)
        # They are the gradients of one of the last two steps, not a sum or a rest.
        norm = frame.value("0", Signal.GRAD_NORM)
        assert any(
            norm == pytest.approx(script.norms.get(step, -1.0), rel=1e-4)
            for step in range(frame.step - 2, frame.step + 1)
        )
    assert not script.session.findings()


@pytest.mark.parametrize("early", [False, True], ids=["unscaled by step", "unscale_ and clip"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_scaler_does_not_scale_what_is_read(fused: bool, early: bool) -> None:
    script = Script("adamw fused" if fused else "adamw foreach")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    (optimizer,) = script.optimizers
    with script.attach(scaler=scaler):
        for _ in range(32):
            script.zero()
            script.last = script.loss()
            torch.autograd.backward(script.last, retain_graph=True)
            plain = script.norm("0")
            script.zero()
            torch.autograd.backward(scaler.scale(script.last))
            if early:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(script.model.parameters(), 1e6)
            scaler.step(optimizer)
            scaler.update()
            script.zero()
            script.steps += 1
            script.norms[script.steps] = plain
            script.tell()

    assert script.seen
    for frame in script.seen:
        expected = script.norms[frame.step]
        assert frame.value("0", Signal.GRAD_NORM) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_that_the_scaler_skips_is_not_read_as_scaled(fused: bool) -> None:
    script = Script("adamw fused" if fused else "adamw foreach")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, backoff_factor=0.999)
    (optimizer,) = script.optimizers
    poisoned = script.model[2].bias
    assert isinstance(poisoned, Tensor)
    with script.attach(scaler=scaler):
        for step in range(1, 41):
            script.last = script.loss() + (poisoned.sum() * math.inf if step in (10, 20) else 0.0)
            torch.autograd.backward(scaler.scale(script.last))
            scaler.step(optimizer)
            scaler.update()
            script.zero()
            script.tell()

    assert script.seen
    assert all(frame.value("0", Signal.GRAD_NORM) < 100.0 for frame in script.seen)


@pytest.mark.parametrize("parts", [2, 3, 8, 25])
@pytest.mark.parametrize("cleared", [False, True], ids=["session first", "zero_grad first"])
def test_accumulated_gradients_are_read_when_they_are_complete(parts: int, cleared: bool) -> None:
    """``session.step`` after each part, and the optimizer only after all of them."""
    script = Script()
    with script.attach():
        for part in range(1, 101):
            script.backward()
            if part % parts == 0:
                script.step()
                if cleared:
                    script.zero()
            script.tell()
            if part % parts == 0 and not cleared:
                script.zero()

    assert len(script.seen) >= 2
    whole = [pytest.approx(norm, rel=1e-4) for norm in script.norms.values()]
    for frame in script.seen:
        assert frame.value("0", Signal.GRAD_NORM) in whole
        assert frame.value("0", Signal.UPDATE_RATIO) > 0


def test_optimizers_that_take_turns_are_both_read() -> None:
    script = Script("two")
    first, second = script.optimizers
    with script.attach():
        for turn in range(60):
            script.backward()
            (second if turn % 3 == 0 else first).step()
            script.zero()
            script.tell()

    assert len(script.seen) >= 3
    assert all(known(frame) and known(frame, Signal.UPDATE_RATIO) for frame in script.seen)


def test_an_optimizer_that_never_steps_holds_only_the_first_frame_back() -> None:
    script = Script("two")
    layers = [LayerInfo(name, "Linear", (8,), (4,), "float32", 72, True) for name in ("0", "2")]
    watch = partial(grafting.watch, script.model)
    pace = SamplingPace(budget=0)
    sampler = HealthSampler(script.model, script.optimizers, layers, watch=watch, pace=pace)
    frames = []
    for step in range(1, 121):
        script.backward()
        script.optimizers[0].step()
        script.zero()
        frame = sampler.step(step, None)
        if frame is not None:
            frames.append(frame)

    assert [frame.step for frame in frames] == [74, 80, 90, 100, 110, 120]
    assert all(np.isfinite(frame.value("0", Signal.GRAD_NORM)) for frame in frames)


def test_a_step_of_its_own_for_each_parameter_is_read() -> None:
    """The optimizer runs inside the backward pass, which clears each gradient at once."""
    script = Script()
    script.optimizers = [torch.optim.SGD([p], 1e-2) for p in script.model.parameters()]
    by_parameter = dict(zip(script.model.parameters(), script.optimizers, strict=True))

    def step_now(parameter: Tensor) -> None:
        by_parameter[parameter].step()  # type: ignore[index]
        by_parameter[parameter].zero_grad()  # type: ignore[index]

    for parameter in script.model.parameters():
        parameter.register_post_accumulate_grad_hook(step_now)
    with script.attach():
        frames = script.run((BACKWARD, SESSION))

    assert len(frames) >= 2
    assert all(known(frame) for frame in frames)


def test_reading_is_paid_for_only_where_a_frame_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    read = optimizer_steps.OptimizerSteps._read
    monkeypatch.setattr(
        optimizer_steps.OptimizerSteps,
        "_read",
        lambda self, optimizer: (calls.append(1), read(self, optimizer))[1],
    )
    script = Script("two")
    with script.attach():
        frames = script.run(ORDERS["zero_grad first"], 60)

    assert len(calls) <= 2 * (len(frames) + 1)
    assert len(frames) <= 6


def test_losses_are_equal_to_the_bit() -> None:
    found = []
    for watched in (False, True):
        script = Script("adamw foreach")
        if watched:
            script.attach()
        losses = []
        for _ in range(40):
            script.backward()
            script.step()
            script.zero()
            losses.append(script.last.item())
            if watched:
                script.tell()
        found.append(losses)
        if watched:
            script.session.close()

    assert found[0] == found[1]


@pytest.mark.parametrize("order", ORDERS)
def test_a_session_steps_without_a_loss(order: str) -> None:
    script = Script()
    script.with_loss = False
    with script.attach():
        frames = script.run(ORDERS[order])

    assert len(frames) >= 2
    assert all("loss" not in frame.metrics for frame in frames)
    assert all(known(frame) for frame in frames)
    assert not script.session.findings()


def test_a_run_whose_gradients_cannot_be_read_says_so() -> None:
    script = Script()
    trainer = torch.optim.SGD(script.model.parameters(), 1e-2)  # the one that is not attached
    with script.attach(sampling=10) as session:
        for _ in range(70 + 10 * FRAMES_WITHOUT_GRADIENTS):
            script.backward()
            trainer.step()
            trainer.zero_grad()
            script.tell()

        found = [f for f in session.findings() if f.rule == ViolationRule.MISSING_TELEMETRY]

    assert len(found) == 1
    assert "no parameter had a gradient" in found[0].observed


def test_a_tensor_that_gets_no_gradient_is_found_after_zero_grad() -> None:
    script = Script()
    unused = nn.Linear(4, 4)
    script.model.add_module("unused", unused)
    script.model.forward = lambda x: script.model[2](script.model[1](script.model[0](x)))  # type: ignore[method-assign]
    script.optimizers = [torch.optim.SGD(script.model.parameters(), 1e-2)]
    with script.attach() as session:
        script.run((BACKWARD, STEP, ZERO, SESSION), 45)
        layers = {finding.layer for finding in session.findings()}

    assert any("unused" in layer for layer in layers)


def test_closing_leaves_no_hook_on_the_optimizer() -> None:
    script = Script("two")
    with script.attach():
        script.run(ORDERS["zero_grad first"], 12)

    for optimizer in script.optimizers:
        assert not optimizer._optimizer_step_post_hooks
        assert not optimizer._optimizer_step_pre_hooks
