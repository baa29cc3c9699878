"""Rescales weights so that the activations of every layer have a sound spread.

Shape legend: N rows, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import layout
from esper.contracts import Risk
from esper.exceptions import ConfigurationError
from esper.grafting.changes.certify import put_back
from esper.grafting.layers.graph import kind_of
from esper.grafting.remedies import shared_tensors
from esper.remedies.base import Batch, Effect, Remedy, Target
from esper.remedies.centered_updates import CenteredUpdates
from esper.remedies.recurrent import scale_recurrent
from esper.remedies.update_hooks import ScaledUpdates

EARLY_STEPS = 50  # in which little is lost by going back to the first weights
ROUNDS = 4  # how often one layer is measured and scaled
SOUND = (0.9, 1.1)  # root mean square of an output; between these it is left as it is
LARGE_INPUT = 10.0  # root mean square; abnormal_data has the same limit
LARGEST_FACTOR = 1e4
OUTLIER, FEWEST_GAINS = 1.5, 2  # a gain of that many times the median of the layers before it
LARGEST_MEAN = 1.5  # root mean square of the channels' means, in spreads of the layer
SHIFTED = 2.0  # mean of a layer's inputs / their spread; behind a sigmoid it is 2.4, a ReLU 0.7
USUAL_SPREAD = 0.6  # std of a standard normal behind a tanh (0.63) or a ReLU (0.58)
FAINT_SPREAD = 0.4  # below it, updates are scaled; behind a sigmoid it is 0.21
ALIKE = 1e-3  # relative distance of units that have nearly the same weights
LARGEST_UPDATES = 3.0  # times larger; chosen on seeds 0 to 9
COMMON = 0.1  # mean / spread of a layer's inputs; below it, there is little to take out
FEWEST_ROWS, MOST_FEATURES = 16, 1024  # of a batch that tells the size of each feature
UNEQUAL = 30.0  # largest / smallest spread of the features, above which each is scaled by itself
RARE = 0.5  # share of rows that are alike; the spread of such a feature says little
_KINDS = layout.LINEAR | layout.TRANSPOSED_LINEAR | layout.CONVOLUTION


class RepairScale(Remedy):
    slug = "repair_scale"
    title = "Repair the scale of the weights"
    idea = (
        "Scales the weights of each layer, in the order in which they run, so that the root mean "
        "square of its output on one batch is 1. Where most of an output is the same for all "
        "inputs, the biases are set to zero, or, where that is not enough, so that they take it "
        "out. The last layer is only scaled down, and no layer far beyond those before it. A run "
        "of at most 50 steps first goes back to its first weights, where they are kept. Layers "
        "whose units are equal get new random weights before they are scaled. The recurrent "
        "weights of a plain RNN whose output grows along the sequence are made smaller. Where the "
        "inputs of the first layer are large, its updates get smaller too, as if the inputs were "
        "scaled, each feature by itself where they differ far in size; where those of a later "
        "layer hardly differ, as behind a sigmoid, its updates get "
        "larger. A later layer learns as if the mean of its inputs were taken out of them."
    )
    source = (
        "LSUV, arXiv 1511.06422; Krähenbühl et al. 2016, arXiv 1511.06856; Schraudolph 1998, "
        "Centering neural network gradient factors"
    )
    when = "The initialisation makes activations vanish, explode or saturate before training."
    risk = Risk.MEDIUM
    changes_weights = True
    needs_sample = True
    begins_anew = True

    def default_config(self) -> dict[str, Any]:
        return {"first_only": False}  # the first layer that runs, where nothing but the data is

    def check_config(self, config: dict[str, Any]) -> None:
        if not isinstance(config["first_only"], bool):
            value = config["first_only"]
            raise ConfigurationError(f"first_only must be true or false, got {value!r}")

    def so_far(self, details: dict[str, Any]) -> str:
        return f"layers: {', '.join(details['factors'])}" if len(details["factors"]) < 4 else ""

    def why_not(self, target: Target, config: dict[str, Any]) -> str:
        if target.sample is None:
            return "it needs a batch of the model's inputs; give it as sample"
        if not any(map(_learns, _candidates(target.model).values())):
            return "the model has no linear layer or convolution that learns"
        return ""

    def apply(self, target: Target, config: dict[str, Any]) -> Effect:
        assert target.sample is not None
        details = {**config, **_begin_anew(target)}
        with torch.no_grad(), put_back(target.model, None):
            order = _order(target.model, target.sample)
            # Frozen weights are another training's, or are meant as they are.
            own = [name for name in order if _learns(target.model.get_submodule(name))]
            if not config["first_only"] and (alike := _layers_of_equal_units(target.model, own)):
                details["new"] = _give_new_weights(target.model, alike)
            factors = {} if config["first_only"] else _scale_recurrent(target)
            inputs = _input_size(target.model, order[0], target.sample) if order else 1.0
            first = [name for name in order[:1] if name in own]
            features = _features(target.model, first, target.sample, inputs)
            if features:
                details["features"] = {order[0]: features}
                _scale_features(target.model.get_submodule(order[0]), features)
            repaired = first if config["first_only"] else own
            factors |= _repair_in_order(target.model, order, repaired, target.sample)
            later = [] if config["first_only"] else [name for name in own if name not in first]
            entering = _input_moments(target.model, later, target.sample)
        _forget_moments(target, [*details.get("new", ()), *factors])
        details["factors"] = factors
        updates = {
            name: max(spread / USUAL_SPREAD, 1.0 / LARGEST_UPDATES)
            for name, (mean, spread) in entering.items()
            # Around zero it is faint on purpose, as behind a mean over an image, and comes back.
            if LARGEST_FACTOR**-1 < spread < FAINT_SPREAD and abs(mean) > SHIFTED * spread
        }
        if first and inputs > LARGE_INPUT and not features:
            updates[first[0]] = inputs
        if updates:
            details["updates"] = updates
        means = {
            name: mean
            for name, (mean, spread) in entering.items()
            if spread > LARGEST_FACTOR**-1 and abs(mean) > COMMON * spread
        }
        if means:
            details["means"] = means
        return self.resume(target, details)

    def resume(self, target: Target, details: dict[str, Any]) -> Effect:
        updates, means = details.get("updates", {}), details.get("means", {})
        ends = [
            _change_updates(target, layer, updates.get(layer, 1.0), means.get(layer, 0.0))
            for layer in {**updates, **means}
        ]
        for layer, features in details.get("features", {}).items():
            module = target.model.get_submodule(layer)
            spread, mean = (_of_columns(module, features[key]) for key in ("spread", "mean"))
            ends.append(_change_updates(target, layer, spread, mean))

        def end() -> None:
            for one in ends:
                one()

        return Effect(details, end)


def _change_updates(
    target: Target, layer: str, inputs: float | Tensor, mean: float | Tensor
) -> Callable[[], None]:
    """The layer learns as if its inputs were ``inputs`` times smaller, and its weights larger.

    The gradient is then ``inputs`` times smaller, and a step counts as much less again. Only with
    SGD does the size of a step depend on that of the gradient.

    Args:
        inputs: of all, or of each feature, in a shape that fits the weight.
        mean: of the inputs; it is taken out of them as well.
    """
    module = target.model.get_submodule(layer)
    weight = module._parameters["weight"]
    assert weight is not None
    ends = []
    for optimizer in target.optimizers:
        if any(weight is p for group in optimizer.param_groups for p in group["params"]):
            power = 2 if isinstance(optimizer, torch.optim.SGD) else 1
            if isinstance(inputs, Tensor) or inputs != 1.0:
                ends.append(ScaledUpdates([optimizer], {id(weight)}, inputs**-power).end)
            # Afterwards, as it corrects by the whole update.
            if mean.any() if isinstance(mean, Tensor) else mean:
                ends.append(CenteredUpdates(optimizer, module, mean).end)

    def end() -> None:
        for one in ends:
            one()

    return end


def _begin_anew(target: Target) -> dict[str, Any]:
    """Goes back to the first weights of a young run: a few updates may have damaged them."""
    first = target.states.before(0) if target.states is not None else None
    if first is None or target.step > EARLY_STEPS:
        return {}
    assert target.states is not None
    target.states.restore(first)
    return {"to_step": first.step}


def _forget_moments(target: Target, layers: list[str]) -> None:
    """What an optimizer has accumulated belongs to weights of another size."""
    for name in layers:
        for parameter in target.model.get_submodule(name).parameters(recurse=False):
            for optimizer in target.optimizers:
                optimizer.state.pop(parameter, None)


def _scale_recurrent(target: Target) -> dict[str, float]:
    """The factors of the recurrent weights that were changed."""
    assert target.sample is not None
    shared, factors = shared_tensors(target.model), {}
    names = [
        name
        for name, module in target.model.named_modules()
        if isinstance(module, nn.RNN)
        and all(p.requires_grad and id(p) not in shared for p in module.parameters())
    ]

    def scale(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        factors[name] = scale_recurrent(module, args, kwargs)

    if names:
        with _before_first_runs(target.model, names, scale):
            target.sample.run(target.model)
    return {name: factor for name, factor in factors.items() if factor != 1.0}


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    shared = shared_tensors(model)
    return {
        name: module
        for name, module in model.named_modules()
        if kind_of(module) in _KINDS
        and isinstance(module._parameters.get("weight"), nn.Parameter)
        and not any(id(p) in shared for p in module.parameters(recurse=False))
    }


def _learns(module: nn.Module) -> bool:
    weight = module._parameters["weight"]
    return weight is not None and weight.requires_grad


def _order(model: nn.Module, sample: Batch) -> list[str]:
    """Names of the layers as they run."""
    seen: dict[str, None] = {}
    candidates = _candidates(model)
    handles = [
        module.register_forward_hook(lambda *_, name=name: seen.setdefault(name))
        for name, module in candidates.items()
    ]
    try:
        sample.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return list(seen)


def _layers_of_equal_units(model: nn.Module, order: list[str]) -> list[str]:
    """Whose units learn the same. Zeros beside other layers are meant, as in a new adapter."""
    alike = [name for name in order if _is_alike(_unit_rows(model.get_submodule(name)))]
    if len(alike) == len(order):
        return alike
    return [name for name in alike if bool(_unit_rows(model.get_submodule(name)).any())]


def _unit_rows(module: nn.Module) -> Tensor:
    """float [R, I]: what some of the units make of their inputs."""
    weight = module._parameters["weight"]
    assert weight is not None
    units = weight.detach().T if kind_of(module) in layout.TRANSPOSED_LINEAR else weight.detach()
    return units[:64].flatten(1)[:, :512].float()


def _is_alike(rows_RI: Tensor) -> bool:
    """Most rows are that before them. Two may be so by design, as the outputs of a gate."""
    if len(rows_RI) <= 2:
        return False
    distance_R = (rows_RI[1:] - rows_RI[:-1]).norm(dim=1)
    alike_R = distance_R <= ALIKE * rows_RI[:-1].norm(dim=1)
    return bool(alike_R.float().mean() >= 0.5)


def _give_new_weights(model: nn.Module, layers: list[str]) -> list[str]:
    """Standard normal ones, which are scaled afterwards; equal on all ranks."""
    numbers = torch.Generator("cpu").manual_seed(0)
    for name in layers:
        weight = model.get_submodule(name)._parameters["weight"]
        assert weight is not None
        new = torch.randn(weight.shape, generator=numbers, device="cpu", dtype=torch.float32)
        weight.copy_(new / math.sqrt(max(1, weight[0].numel())))
    return layers


def _input_size(model: nn.Module, name: str, sample: Batch) -> float:
    """Root mean square of what enters the layer."""
    found: list[float] = []

    def look(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            found.append(float(args[0].float().square().mean().sqrt()))

    handle = model.get_submodule(name).register_forward_pre_hook(look)
    try:
        sample.run(model)
    finally:
        handle.remove()
    return found[0] if found and math.isfinite(found[0]) else 1.0


def _features(
    model: nn.Module, order: list[str], sample: Batch, inputs: float
) -> dict[str, list[float]]:
    """The mean and the spread of each feature of the data; empty where one size fits them all.

    One factor for all would follow the largest of them, and the others would never count.
    """
    if not order or inputs <= LARGE_INPUT:
        return {}
    module = model.get_submodule(order[0])
    rows_NC = _rows(model, order[0], sample)
    if kind_of(module) not in layout.LINEAR | layout.TRANSPOSED_LINEAR:
        return {}
    if len(rows_NC) < FEWEST_ROWS or rows_NC.shape[1] > MOST_FEATURES:
        return {}
    if not bool(rows_NC.isfinite().all()):
        return {}
    mean_C, spread_C = rows_NC.mean(0), rows_NC.std(0, unbiased=False)
    rare_C = (rows_NC == rows_NC.median(0).values).float().mean(0) > RARE
    usual = spread_C[~rare_C]
    if len(usual) < 2 or float(usual.max()) <= UNEQUAL * float(usual.min()):
        return {}
    # A rare value may be far away: its own distance counts, or the size of all where none was seen.
    far_C = (rows_NC - mean_C).abs().amax(0)
    far_C = torch.where(far_C > 0, far_C, torch.full_like(far_C, inputs))
    spread_C = torch.where(rare_C, far_C, spread_C)
    if module._parameters.get("bias") is None:  # nothing can take the mean out
        spread_C, mean_C = (spread_C.square() + mean_C.square()).sqrt(), torch.zeros_like(mean_C)
    return {"mean": mean_C.tolist(), "spread": spread_C.tolist()}


def _scale_features(module: nn.Module, features: dict[str, list[float]]) -> None:
    """The layer computes what it would compute of features with a mean of 0 and a spread of 1."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    weight.div_(_of_columns(module, features["spread"]))
    if bias is not None:
        axis = 0 if kind_of(module) in layout.TRANSPOSED_LINEAR else 1
        bias.sub_((weight * _of_columns(module, features["mean"])).sum(axis))


def _of_columns(module: nn.Module, values_C: list[float]) -> Tensor:
    """One number for each input of a linear layer, in a shape that fits its weight."""
    weight = module._parameters["weight"]
    assert weight is not None
    shape = (-1, 1) if kind_of(module) in layout.TRANSPOSED_LINEAR else (1, -1)
    return torch.tensor(values_C, dtype=weight.dtype, device=weight.device).reshape(shape)


def _rows(model: nn.Module, name: str, sample: Batch) -> Tensor:
    """float [N, C]: what enters the layer, places of an image as rows of their own."""
    found: list[Tensor] = []

    def look(_: str, module: nn.Module, args: tuple[Any, ...], __: Any) -> None:
        found.append(_rows_in(module, args))

    with _before_first_runs(model, [name], look):
        sample.run(model)
    return found[0] if found else _rows_in(model, ())


def _rows_in(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
    if not args or not isinstance(args[0], Tensor):
        return torch.zeros((0, 1), dtype=torch.float32, device="cpu")
    axis = layout.channel_axis_of(kind_of(module))
    return args[0].detach().float().movedim(axis, -1).flatten(0, -2)


def _moments(rows_NC: Tensor) -> tuple[float, float]:
    """(mean, std within a channel): how much the rows differ."""
    if not len(rows_NC):
        return math.nan, math.nan
    spread = rows_NC.var(0, unbiased=False).mean().sqrt()
    return float(rows_NC.mean()), float(spread)


def _input_moments(
    model: nn.Module, names: list[str], sample: Batch
) -> dict[str, tuple[float, float]]:
    """Of what enters each layer."""
    found = dict.fromkeys(names, (math.nan, math.nan))

    def look(name: str, module: nn.Module, args: tuple[Any, ...], _: Any) -> None:
        found[name] = _moments(_rows_in(module, args))

    if names:
        with _before_first_runs(model, names, look):
            sample.run(model)
    return found


def _repair_in_order(
    model: nn.Module, order: list[str], repaired: list[str], sample: Batch
) -> dict[str, float]:
    """Repairs each layer just before it first runs, behind those that are repaired.

    One pass of the model: a pass for each look at each layer took minutes on a thousand layers.

    Returns:
        The factors of the weights that were changed.
    """
    gains: list[float] = []  # of the layers so far, after their repair
    factors: dict[str, float] = {}

    def repair(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        rows_NC = _rows_in(module, args)
        mean, spread = _moments(rows_NC)
        is_shifted = name != order[0] and abs(mean) > SHIFTED * spread
        # Rows that differ little around zero do so on purpose, as behind a mean over an image. What
        # leaves a ReLU is never below zero, and fades in a deep net.
        is_faint = spread < FAINT_SPREAD and not is_shifted and bool((rows_NC < 0).any())
        above = 1.0 if is_faint else OUTLIER
        largest = above * median(gains) if len(gains) >= FEWEST_GAINS else math.inf
        factor = _repair(
            module,
            lambda: _rows_out(module, module(*args, **kwargs)),
            largest,
            last=name == order[-1],
            shifted=is_shifted,
        )
        gains.append(_gain(module))
        if factor != 1.0:
            factors[name] = factor

    with _before_first_runs(model, repaired, repair):
        sample.run(model)
    return factors


@contextmanager
def _before_first_runs(
    model: nn.Module, names: list[str], act: Callable[..., None]
) -> Iterator[None]:
    """Calls ``act(name, module, args, kwargs)`` before the first run of each layer."""
    seen: set[str] = set()

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], *kwargs: Any) -> None:
        # torch leaves the keyword arguments out in a pass of another thread that runs just now.
        if kwargs and name not in seen:
            seen.add(name)
            act(name, module, args, *kwargs)

    handles = [
        # Before the script's own hooks, which change the inputs in each call.
        model.get_submodule(name).register_forward_pre_hook(
            partial(hook, name), prepend=True, with_kwargs=True
        )
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _repair(
    module: nn.Module,
    outputs: Callable[[], Tensor],
    largest_gain: float,
    *,
    last: bool,
    shifted: bool,
) -> float:
    """Scales one layer; returns the factor of its weights.

    Args:
        outputs: float [N, C]: what the layer gives to the batch with its present weights.
        largest_gain: up to which weights are made larger. What differs little on purpose, such as
            means over an image, is brought back by this layer and the next ones together.
        shifted: its inputs have a mean far larger than their spread, so its outputs have one too.
    """
    weight = module._parameters["weight"]
    assert weight is not None
    bias = module._parameters.get("bias")
    bias = bias if bias is not None and bias.requires_grad else None
    if bias is not None and bias.any() and _is_common(outputs()):
        bias.zero_()
    total = 1.0
    for _ in range(ROUNDS):
        outputs_NC = outputs()
        if bias is not None and (shifted or _is_common(outputs_NC)):
            mean_C = outputs_NC.mean(0)
            bias.sub_(mean_C.to(bias))
            outputs_NC = outputs_NC - mean_C
        size = float(outputs_NC.square().mean().sqrt())
        sound = SOUND[0] <= size <= SOUND[1] or (last and size <= SOUND[1])
        if sound or not 0 < size < float("inf"):
            break
        factor = min(max(1.0 / size, 1.0 / LARGEST_FACTOR), LARGEST_FACTOR)
        factor = min(factor, max(1.0, largest_gain / _gain(module)))
        if factor == 1.0:
            break
        weight.mul_(factor)
        total *= factor
    return total


def _is_common(outputs_NC: Tensor) -> bool:
    """Most of what the layer gives is the same for all rows."""
    spread, mean = outputs_NC.var(0, unbiased=False).mean(), outputs_NC.mean(0).square().mean()
    return bool(mean > LARGEST_MEAN**2 * spread)


def _gain(module: nn.Module) -> float:
    """Root mean square of the weights x sqrt(inputs of one output)."""
    weight = module._parameters["weight"]
    assert weight is not None
    outputs = weight.shape[1 if kind_of(module) in layout.TRANSPOSED_LINEAR else 0]
    return float(weight.detach().float().norm()) / math.sqrt(max(1, outputs))


def _rows_out(module: nn.Module, output: Any) -> Tensor:
    """float [N, C]: what a layer gives, places of an image as rows of their own."""
    if not isinstance(output, Tensor):
        return torch.zeros((1, 1), dtype=torch.float32, device="cpu")
    axis = layout.channel_axis_of(kind_of(module))
    return output.detach().float().movedim(axis, -1).flatten(0, -2)
