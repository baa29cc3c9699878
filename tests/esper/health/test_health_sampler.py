"""The sampler on tiny real models: right numbers, no trace in the training, within its budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from esper.contracts import HealthFrame, LayerInfo, Signal
from esper.health import HealthSampler
from esper.health.activations import activation_statistics
from esper.health.pace import SamplingPace
from esper.health.stable_ranks import stable_rank
from tests.esper.health.forward_hooks import forward_hook_watch

Loop = Iterator[tuple[int, torch.Tensor]]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 8), nn.Linear(8, 3)
    )


def layers_of(model: nn.Module, names: tuple[str, ...] = ("0", "3", "4")) -> list[LayerInfo]:
    return [LayerInfo(name, "Linear", (4, 8), (4, 8), "float32", 72, True) for name in names]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Loop:
    data = torch.Generator().manual_seed(7)
    for step in range(1, steps + 1):
        x = torch.randn(16, 6, generator=data)
        loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        yield step, loss


def sampler_for(
    model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any
) -> HealthSampler:
    periods = {name: options.pop(name) for name in ("frame_every", "deep_every") if name in options}
    pace = SamplingPace(budget=options.pop("budget", 0.0), **periods)
    watch = forward_hook_watch(model)
    return HealthSampler(model, [optimizer], layers_of(model), watch=watch, pace=pace, **options)


def test_losses_are_equal_to_the_bit_with_and_without_it() -> None:
    losses: list[list[float]] = []
    for watched in (False, True):
        model = small_net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        sampler = sampler_for(model, optimizer, frame_every=3, deep_every=3)
        seen = []
        for step, loss in train(model, optimizer, 40):
            if watched:
                sampler.step(step, loss)
            seen.append(loss.item())
        losses.append(seen)

    assert losses[0] == losses[1]


def test_norms_and_update_ratio_are_those_computed_by_hand() -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sampler = sampler_for(model, optimizer, frame_every=5)
    before = [p.detach().clone() for p in model[3].parameters()]
    for step, loss in train(model, optimizer, 10):
        frame = sampler.step(step, loss, {"accuracy": 0.5})
        if frame is not None:
            break
        before = [p.detach().clone() for p in model[3].parameters()]
    assert frame is not None
    now = [p.detach().clone() for p in model[3].parameters()]
    norm = math.sqrt(sum(float(p.square().sum()) for p in now))
    grad = math.sqrt(
        sum(float(p.grad.square().sum()) for p in model[3].parameters() if p.grad is not None)
    )
    update = math.sqrt(
        sum(float((p - old).square().sum()) for p, old in zip(now, before, strict=True))
    )
    old_norm = math.sqrt(sum(float(old.square().sum()) for old in before))

    assert frame.step == 5
    assert frame.value("3", Signal.WEIGHT_NORM) == pytest.approx(norm, rel=1e-5)
    assert frame.value("3", Signal.GRAD_NORM) == pytest.approx(grad, rel=1e-5)
    assert frame.value("3", Signal.UPDATE_RATIO) == pytest.approx(update / old_norm, rel=1e-3)
    assert frame.metrics["loss"] == pytest.approx(loss.item())
    assert frame.metrics["accuracy"] == 0.5
    assert frame.metrics["lr"] == pytest.approx(0.1)


def frames_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 30, **options: Any
) -> list[HealthFrame]:
    sampler = sampler_for(model, optimizer, **options)
    found = (sampler.step(step, loss) for step, loss in train(model, optimizer, steps))
    return [frame for frame in found if frame is not None]


def test_activations_and_ranks_are_there_in_deep_frames_and_unknown_in_others() -> None:
    model = small_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    frames = frames_of(model, optimizer, frame_every=5, deep_every=10)
    deep = {frame.step for frame in frames if not math.isnan(frame.value("0", Signal.ACT_STD))}

    assert [frame.step for frame in frames] == [5, 10, 15, 20, 25, 30]
    assert deep == {10, 20, 30}
    for signal in (Signal.STABLE_RANK, Signal.GRAD_SNR, Signal.SATURATION):
        assert math.isnan(frames[0].value("0", signal))
        assert math.isfinite(frames[1].value("0", signal))


def test_a_healthy_run_is_healthy_in_every_frame() -> None:
    model = small_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for frame in frames_of(model, optimizer, frame_every=5, deep_every=10):
        assert bool((frame.column(Signal.HEALTH) > 0.8).all())


def test_a_layer_that_no_optimizer_trains_is_unhealthy_and_a_frozen_one_is_not() -> None:
    forgotten, frozen = small_net(), small_net()
    frozen[3].requires_grad_(False)
    for model, name, sick in ((forgotten, "3", True), (frozen, "3", False)):
        held = [p for n, p in model.named_parameters() if not n.startswith("3.")]
        frame = frames_of(model, torch.optim.AdamW(held, lr=1e-3), frame_every=5)[-1]
        assert (frame.value(name, Signal.HEALTH) < 0.5) is sick


def test_the_update_ratio_of_an_optimizer_that_made_no_step_is_unknown() -> None:
    model = small_net()
    stepped = torch.optim.SGD(model[0].parameters(), lr=0.0)
    silent = torch.optim.SGD(model[3].parameters(), lr=0.1)
    pace = SamplingPace(budget=0.0, frame_every=2)
    watch = forward_hook_watch(model)
    sampler = HealthSampler(model, [stepped, silent], layers_of(model), watch=watch, pace=pace)
    taken = [sampler.step(step, loss) for step, loss in train(model, stepped, 80)]
    frames = [frame for frame in taken if frame is not None]

    assert frames
    for frame in frames:
        assert frame.value("0", Signal.UPDATE_RATIO) == 0.0
        assert math.isnan(frame.value("3", Signal.UPDATE_RATIO))


def test_a_gradient_that_is_not_finite_is_measured_not_unknown() -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sampler = sampler_for(model, optimizer, frame_every=2)
    next(model[3].parameters()).register_hook(lambda gradient: gradient * math.nan)
    for step, loss in train(model, optimizer, 2):
        frame = sampler.step(step, loss)

    assert frame is not None
    assert frame.value("3", Signal.GRAD_NORM) == math.inf
    assert frame.value("3", Signal.HEALTH) < 0.5


def test_parameters_of_a_graft_count_for_the_graft_not_for_its_host() -> None:
    model = small_net()
    host_norm = math.sqrt(sum(p.square().sum().item() for p in model[3].parameters()))
    graft = nn.Linear(8, 8)
    model[3].esper = graft
    model[3].register_forward_hook(lambda module, args, y: y + module.esper(args[0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    frame = frames_of(model, optimizer, steps=2, frame_every=2)[-1]
    host = sum(
        p.grad.square().sum().item()
        for name, p in model[3].named_parameters()
        if p.grad is not None and not name.startswith("esper.")
    )
    own = sum(float(p.grad.square().sum()) for p in graft.parameters() if p.grad is not None)

    assert frame.value("3", Signal.WEIGHT_NORM) == pytest.approx(host_norm, rel=1e-5)
    assert frame.value("3", Signal.GRAFT_GRAD_SHARE) == pytest.approx(
        math.sqrt(own / (own + host)), rel=1e-4
    )
    assert math.isnan(frame.value("4", Signal.GRAFT_GRAD_SHARE))


def test_a_graft_that_comes_later_is_noticed_without_being_told() -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    sampler = sampler_for(model, optimizer, frame_every=4)
    shares = []
    for step, loss in train(model, optimizer, 12):
        frame = sampler.step(step, loss)
        if frame is not None:
            shares.append(frame.value("3", Signal.GRAFT_GRAD_SHARE))
        if step == 5:
            model[3].esper = nn.Linear(8, 8)
            model[3].register_forward_hook(lambda module, args, y: y + module.esper(args[0]))
            optimizer.add_param_group({"params": list(model[3].esper.parameters())})

    assert math.isnan(shares[0])
    assert shares[-1] > 0


def test_evaluation_without_gradients_is_not_what_is_looked_at() -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    sampler = sampler_for(model, optimizer, frame_every=2, deep_every=2)
    for step, loss in train(model, optimizer, 2):
        frame = sampler.step(step, loss)
        with torch.no_grad():
            model(torch.full((4, 6), 1e6))

    assert frame is not None
    assert frame.value("4", Signal.ACT_STD) < 100


def test_no_watcher_is_left_behind() -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    sampler = sampler_for(model, optimizer, frame_every=3, deep_every=3)
    for step, loss in train(model, optimizer, 5):
        sampler.step(step, loss)
    assert any(module._forward_hooks for module in model.modules())
    sampler.close()

    assert not any(module._forward_hooks for module in model.modules())


def test_the_period_grows_until_sampling_costs_what_it_may() -> None:
    # A clock that moves 1 ms at each reading: a frame costs many readings, a step is 1 ms long.
    ticks = count()
    clock: Callable[[], float] = lambda: next(ticks) * 1e-3  # noqa: E731
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sampler = sampler_for(model, optimizer, budget=0.1, frame_every=2, deep_every=4, clock=clock)
    steps = 600
    found = [sampler.step(step, loss) for step, loss in train(model, optimizer, steps)]
    frames = [frame for frame in found if frame is not None]
    last = frames[-1].metrics

    assert last["frame_period"] > 2
    assert last["deep_period"] >= last["frame_period"]
    assert len(frames) < steps / 10


def test_what_others_make_of_a_frame_is_in_its_budget() -> None:
    periods = []
    for later in (0.0, 0.5):
        ticks = (tick * 1e-3 for tick in count())
        model = small_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        sampler = sampler_for(
            model, optimizer, budget=0.1, frame_every=2, deep_every=4, clock=ticks.__next__
        )
        for step, loss in train(model, optimizer, 120):
            frame = sampler.step(step, loss)
            if frame is not None:
                sampler.spend(later)
        periods.append(sampler._pace.at(120).frame)

    assert periods[1] >= 8 * periods[0]


def test_the_first_frames_come_at_the_shortest_period() -> None:
    model = small_net()
    frames = frames_of(model, torch.optim.SGD(model.parameters(), lr=1e-3), steps=9, frame_every=1)

    assert [frame.step for frame in frames] == list(range(1, 10))
    assert math.isnan(frames[0].value("0", Signal.UPDATE_RATIO))
    assert math.isfinite(frames[1].value("0", Signal.UPDATE_RATIO))


def test_stable_rank_of_known_matrices() -> None:
    start = torch.randn(8, generator=torch.Generator().manual_seed(0))
    identity, _ = stable_rank(torch.eye(8), start, 4)
    outer, _ = stable_rank(torch.outer(torch.arange(1.0, 9.0), torch.ones(8)), start, 4)
    zero, _ = stable_rank(torch.zeros(8, 8), start, 4)

    assert identity.item() == pytest.approx(1.0)
    assert outer.item() == pytest.approx(1 / 8, rel=1e-4)
    assert zero.item() == 0.0


def test_dead_and_saturated_units_are_counted() -> None:
    h = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    h[:, :3] = 0.0
    mean, std, dead, *_ = activation_statistics(h, -1).tolist()
    clipped = activation_statistics(torch.where(h > 0, 1.0, -1.0), -1).tolist()
    rectified = activation_statistics(torch.relu(h), -1).tolist()

    assert (mean, std) == pytest.approx((h.mean().item(), h.std(correction=0).item()), rel=1e-5)
    assert dead == pytest.approx(0.3)
    assert clipped[3] == 1.0
    assert rectified[3] < 0.1  # its zeros are rest, not saturation


def test_units_of_a_convolution_are_its_channels() -> None:
    y = torch.randn(4, 5, 6, 7)
    y[:, 2] = 0.0

    assert activation_statistics(y, 1)[2].item() == pytest.approx(1 / 5)


def test_gradient_snr_tells_a_steady_gradient_from_noise() -> None:
    weights = nn.ModuleDict({"steady": nn.Linear(50, 1), "noise": nn.Linear(50, 1)})
    optimizer = torch.optim.Adam(weights.parameters(), lr=1e-4)
    infos = layers_of(weights, ("steady", "noise"))
    sampler = HealthSampler(
        weights,
        [optimizer],
        infos,
        watch=forward_hook_watch(weights),
        pace=SamplingPace(budget=0, frame_every=100, deep_every=100),
    )
    noise = torch.Generator().manual_seed(0)
    for step in range(1, 401):
        for parameter in weights["steady"].parameters():
            parameter.grad = torch.ones_like(parameter)
        for parameter in weights["noise"].parameters():
            parameter.grad = torch.randn(parameter.shape, generator=noise)
        optimizer.step()
        frame = sampler.step(step, 0.0)

    assert frame is not None
    assert frame.value("steady", Signal.GRAD_SNR) > 10
    assert frame.value("noise", Signal.GRAD_SNR) == pytest.approx(0.23, abs=0.06)


def test_half_precision_and_sparse_gradients_are_measured() -> None:
    model = nn.ModuleDict(
        {"table": nn.Embedding(10, 4, sparse=True), "map": nn.Linear(4, 2).bfloat16()}
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sampler = HealthSampler(
        model,
        [optimizer],
        layers_of(model, ("table", "map")),
        watch=forward_hook_watch(model),
        pace=SamplingPace(frame_every=1),
    )
    h = model["table"](torch.tensor([1, 1, 2]))
    loss = model["map"](h.bfloat16()).square().sum()
    torch.autograd.backward(loss)
    optimizer.step()
    frame = sampler.step(1, loss)

    assert frame is not None
    table = next(model["table"].parameters()).grad
    assert table is not None
    assert frame.value("table", Signal.GRAD_NORM) == pytest.approx(
        table.to_dense().norm().item(), rel=1e-5
    )
    assert np.isfinite(frame.column(Signal.WEIGHT_NORM)).all()
