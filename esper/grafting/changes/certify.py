"""The certificate: the five points of the graft contract, measured on the layer.

    1. same output at first     combine(x, y) equals y, and no random stream advances
    2. alive                    a new tensor has a gradient in the first step (thorough: all tensors
                                within two steps); where it replaces the host, in the second,
                                when α is above 0
    3. undo is exact            thorough: after insertion and removal every tensor is as before
    4. host untouched           gradients of the host and of x are those without the graft
    5. honest cost              parameters as declared; memory and latency are measured

The host does not change: no gradient is stored, buffers and random streams are restored.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from esper.blueprints import Blueprint, Graft, layout
from esper.blueprints.base import COPIES_IN_TRAINING, MIB, introduce
from esper.contracts import Certificate, LayerInfo
from esper.exceptions import IncompatibleLayerError
from esper.fail_closed import is_the_scripts
from esper.grafting.slot import SLOT_NAME, first_tensor, slot_of
from esper.grafting.tensors.digests import digest
from esper.grafting.tensors.random_streams import RandomStreams, draws_nothing, kept_streams
from esper.grafting.tensors.saved_values import write

MAX_ROWS = 4  # of the sample that are used: a certificate must not take as long as a training step
# Hooks of torch.nn.utils that belong to the layer: they compute its weight in each pass.
_MAKES_WEIGHTS = (WeightNorm, SpectralNorm, BasePruningMethod)
CHEAP_FLOPS = 10_000_000  # well below a millisecond on one core: always timed


def certify(
    host: nn.Module,
    layer: LayerInfo,
    blueprint: Blueprint,
    graft: Graft,
    x: Tensor,
    *,
    config: dict[str, Any] | None = None,
    training: bool | None = None,
    streams_before: RandomStreams | None = None,
    thorough: bool = False,
) -> Certificate:
    """Tries ``graft`` beside ``host`` without inserting it.

    Args:
        host: the live layer, or a stand-in from :func:`stand_in`.
        x: a sample input of the layer, or of the first layer of a span; outputs and gradients are
            compared on its first rows, latency is timed on all of it. The output of a span's last
            layer is generated, because the layer cannot be run on another layer's input.
        config: settings that the graft was built from; None: the blueprint's defaults.
        training: mode of the trial; None: the host's mode.
        streams_before: the random streams before the graft was built, to check building too.
        thorough: also checks point 3 and the second half of 2, on copies, and always measures
            latency. For the compile worker; without it, an expensive graft's latency is NaN.

    Returns:
        The certificate; it has passed if it lists no failures.

    Raises:
        IncompatibleLayerError: the layer cannot be run on ``x`` alone.
    """
    built_quietly = (
        streams_before is None
        or streams_before.equals(RandomStreams.read())
        or draws_nothing(lambda: blueprint.build(layer, config, seed=0))
    )
    forecast = blueprint.forecast(layer, blueprint.config_for(layer, config))
    timed = thorough or forecast.flops <= CHEAP_FLOPS
    with put_back(host, training), torch.enable_grad():
        trial, latency_ms, dead = _try_all(
            host, layer, blueprint, graft, x, timed=timed, thorough=thorough
        )
    graft.forget()
    certificate = Certificate(
        max_abs_diff=trial.max_abs_diff,
        tolerance=blueprint.tolerance * trial.scale,
        preserving=trial.max_abs_diff <= blueprint.tolerance * trial.scale and trial.same_form,
        live=trial.live,
        rng_neutral=built_quietly and trial.rng_neutral,
        parameters=sum(p.numel() for p in graft.parameters()),
        parameters_declared=forecast.parameters,
        host_untouched=trial.host_untouched,
        undo_exact=_undo_is_exact(host, graft) if thorough else None,
        memory_mib=_memory_mib(layer, graft, trial),
        latency_ms=latency_ms,
    )
    return replace(certificate, failures=tuple(_failures(certificate, trial, dead)))


def sample_input(layer: LayerInfo, *, seed: int = 0) -> Tensor:
    """A generated input of the layer's traced shape: normal numbers, or zeros for token numbers.

    Only the first rows are drawn, because drawing a large batch takes longer than a training step;
    the others, which are used to time the layer, repeat them.
    """
    shape = tuple(size or MAX_ROWS for size in layer.in_shape)  # it was traced on an empty batch
    if not layer.features_in:
        return torch.zeros(shape, dtype=torch.long, device=layer.device)
    rows, *others = shape
    drawn = _normal((min(rows, MAX_ROWS), *others), layer.device, layout.torch_dtype(layer), seed)
    times = math.ceil(rows / len(drawn))
    return drawn if times == 1 else drawn.repeat(times, *(1 for _ in others))[:rows]


def _normal(
    shape: Sequence[int], device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> Tensor:
    """Normal numbers, drawn on a GPU where they go there: a CPU takes a training step for them."""
    device = torch.device(device)
    place = device if device.type == "cuda" else torch.device("cpu")
    generator = torch.Generator(place).manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float32, device=place)
    return values.to(device=device, dtype=dtype)


def stand_in(layer: LayerInfo, *, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A host of the same kind and shapes with generated weights, and a sample input for it.

    For a compile worker, which has the layer's description but not the model. A kind that the
    description does not define fully becomes a plain map with the same shapes.
    """
    with torch.device("meta"):  # uses no random stream: a training may run at the same time
        host = _make_host(layer).to(layout.torch_dtype(layer))
    host.to_empty(device=layer.device)
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for parameter in host.parameters():
            values = torch.randn(
                parameter.shape, generator=generator, dtype=torch.float32, device="cpu"
            )
            parameter.copy_(values * 0.05)
    return host, sample_input(layer, seed=seed)


@contextmanager
def put_back(host: nn.Module, training: bool | None) -> Iterator[None]:
    """Restores the host's modes and buffers and all random streams afterwards.

    Inside, the script's own hooks of the host's parameters are not called.
    """
    modes = [(module, module.training) for module in host.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in host.buffers()]
    made = _made_tensors(host)
    with kept_streams(), _without_tensor_hooks(host.parameters()):
        try:
            if training is not None:
                host.train(training)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, name, tensor in made:
                vars(module)[name] = tensor
            with torch.no_grad():
                for buffer, value in buffers:
                    write(buffer, value)


@contextmanager
def _without_tensor_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """torch looks into this dict of a tensor at each backward pass, and keeps no copy of it."""
    hooks = [t._backward_hooks for t in tensors if t._backward_hooks]
    kept = [dict(known) for known in hooks]
    for known in hooks:
        known.clear()
    try:
        yield
    finally:
        for known, old in zip(hooks, kept, strict=True):
            known.update(old)


def _made_tensors(host: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """(module, attribute, tensor) of tensors that a forward pass has stored on the modules."""
    return [
        (module, name, value)
        for module in host.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]


@dataclass(slots=True)
class _Trial:
    """Results of one forward and backward pass with the graft."""

    x: Tensor
    y: Tensor
    cotangent: Tensor  # d loss / d output, generated
    max_abs_diff: float
    scale: float
    same_form: bool  # shape, dtype, and x and y not written to
    rng_neutral: bool
    live: bool
    host_untouched: bool
    saved_bytes: int


def _try_all(
    host: nn.Module,
    layer: LayerInfo,
    blueprint: Blueprint,
    graft: Graft,
    x: Tensor,
    *,
    timed: bool,
    thorough: bool,
) -> tuple[_Trial, float, list[str]]:
    """(one pass on the first rows, latency of all rows or NaN, tensors that stayed dead)."""
    sample = x[:MAX_ROWS].detach().clone()
    sample.requires_grad_(sample.is_floating_point())
    y = _output(host, layer, blueprint.slug, sample)
    # Outputs of the older grafts without the new one; those of a span would get its input.
    before = y if layer.since else _run_grafts(host, sample, y)
    with _introduced(host, graft):
        if blueprint.requires:  # what older grafts compute with it is part of the contract
            trial = _try_out(host, graft, sample, before, _run_grafts(host, sample, y))
        else:
            trial = _try_out(host, graft, sample, before, before, spans=bool(layer.since))
        latency_ms = _latency_ms(host, layer, blueprint.slug, graft, x) if timed else math.nan
        dead = _dead_after_two_steps(graft, trial) if thorough else []
    return trial, latency_ms, dead


@contextmanager
def _introduced(host: nn.Module, graft: Graft) -> Iterator[None]:
    """Inside the block, the layer's grafts and the new one know each other."""
    slot = slot_of(host)
    older = tuple(slot.grafts().values()) if slot is not None else ()
    introduce((*older, graft))
    try:
        yield
    finally:
        introduce(older)
        introduce((graft,))


def _try_out(
    host: nn.Module, graft: Graft, x: Tensor, before: Tensor, y: Tensor, *, spans: bool = False
) -> _Trial:
    """``before``: the layer's output without the graft. ``y``: what the graft is given.

    ``spans``: ``y`` was generated, and ``x`` is no input of the host.
    """
    kept = before.detach().clone()
    versions = x._version, y._version
    streams = RandomStreams.read()  # not earlier: the host's own dropout may use them
    with _counted_activations(graft, x) as saved:
        changed = graft.combine(x, y)
    rng_neutral = streams.equals(RandomStreams.read()) or draws_nothing(lambda: graft.combine(x, y))
    cotangent = _made_up_cotangent(y)
    same_form = (
        changed.shape == y.shape
        and changed.dtype == y.dtype
        and versions == (x._version, y._version)
    )
    old: list[Tensor] = [y] if spans else [*host.parameters(), x]
    old = [tensor for tensor in old if tensor.requires_grad]
    live, untouched = _compare_gradients(old, graft, x, before, changed, cotangent)
    return _Trial(
        x=x.detach(),
        y=kept,
        cotangent=cotangent,
        max_abs_diff=_distance(changed, kept),
        scale=float(kept.abs().max()) if kept.numel() else 0.0,
        same_form=same_form,
        rng_neutral=rng_neutral,
        live=live,
        host_untouched=untouched,
        saved_bytes=sum(saved.values()),
    )


def _run_host(host: nn.Module, layer: LayerInfo, blueprint: str, x: Tensor) -> Tensor:
    """The layer's own output on ``x``.

    Uses ``forward`` and not a call: the user's hooks must not see a generated batch.
    """
    arguments = (x, x, x) if layer.kind in layout.ATTENTION else (x,)
    for hook in host._forward_pre_hooks.values():
        if isinstance(hook, _MAKES_WEIGHTS):
            hook(host, arguments)
    try:
        y = first_tensor(host.forward(*arguments))
    except Exception as error:
        if is_the_scripts(error):
            raise
        reason = f"it cannot be run on its first input alone ({error})"
        raise IncompatibleLayerError(
            layer=layer.name, blueprint=blueprint, reason=reason
        ) from error
    if y is None:
        raise IncompatibleLayerError(
            layer=layer.name, blueprint=blueprint, reason="its output is not a plain tensor"
        )
    same_axes = layer.features_out and y.dim() == len(layer.out_shape)
    if same_axes and y.shape[layer.channel_axis] != layer.features_out:
        # The script has replaced or widened the layer's weights since it was traced.
        reason = (
            f"it gives {y.shape[layer.channel_axis]} features now, and gave {layer.features_out} "
            "when Esper was attached: attach again"
        )
        raise IncompatibleLayerError(layer=layer.name, blueprint=blueprint, reason=reason)
    return y


def _output(host: nn.Module, layer: LayerInfo, blueprint: str, x: Tensor) -> Tensor:
    """The layer's own output, generated for a span."""
    if not layer.since:
        return _run_host(host, layer, blueprint, x)
    values = _normal((len(x), *layer.out_shape[1:]), x.device, x.dtype)
    return values.requires_grad_(torch.is_grad_enabled())


def _run_grafts(host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The layer's output after its present grafts, without those that span layers."""
    slot = slot_of(host)
    if slot is None:
        return y
    for slug, older in slot.grafts().items():
        if slug not in slot.carriers:
            y = older.combine(x, y)
    return y


def _compare_gradients(
    old: list[Tensor], graft: Graft, x: Tensor, y: Tensor, changed: Tensor, cotangent: Tensor
) -> tuple[bool, bool]:
    """(a new tensor has a gradient, the gradients of the old tensors are unchanged)."""
    new = [p for p in graft.parameters() if p.requires_grad]
    without = _gradients(y, old, cotangent)
    both = _gradients(changed, [*old, *new], cotangent.to(changed.dtype))
    untouched = all(_same(a, b) for a, b in zip(without, both[: len(old)], strict=True))
    live = not new or any(_alive(grad) for grad in both[len(old) :])
    return live or _wakes_up(graft, x, y, cotangent), untouched


def _wakes_up(graft: Graft, x: Tensor, y: Tensor, cotangent: Tensor) -> bool:
    """A graft with an α has a gradient once α is above 0, which is after one step."""
    ramped = [part for part in graft.modules() if isinstance(part, Graft)]
    if all(part.alpha is None for part in ramped):
        return False
    later = copy.deepcopy(graft)
    later.on_step()
    changed = later.combine(x.detach(), y.detach())
    new = [p for p in later.parameters() if p.requires_grad]
    return any(map(_alive, _gradients(changed, new, cotangent.to(changed.dtype))))


def _gradients(
    output: Tensor, inputs: Sequence[Tensor], cotangent: Tensor
) -> tuple[Tensor | None, ...]:
    if not inputs or not output.requires_grad:
        return (None,) * len(inputs)
    return torch.autograd.grad(output, inputs, cotangent, retain_graph=True, allow_unused=True)


def _same(mine: Tensor | None, theirs: Tensor | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    if mine.is_sparse and theirs.is_sparse:
        mine, theirs = mine.coalesce(), theirs.coalesce()
        same_places = torch.equal(mine.indices(), theirs.indices())
        return same_places and _same(mine.values(), theirs.values())
    return torch.equal(mine, theirs) or torch.equal(mine.nan_to_num(), theirs.nan_to_num())


def _alive(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())


def _distance(changed: Tensor, kept: Tensor) -> float:
    """max |a - b|; infinite where the shapes differ or only one of the two is finite."""
    if changed.shape != kept.shape:
        return math.inf
    if not kept.numel():
        return 0.0
    difference = (changed.detach() - kept).abs().float()
    both_odd = ~changed.detach().isfinite() & ~kept.isfinite()
    difference = torch.where(both_odd, 0.0, difference)
    return float(difference.nan_to_num(nan=math.inf).max())


@contextmanager
def _counted_activations(graft: Graft, x: Tensor) -> Iterator[dict[int, int]]:
    """Fills {storage: bytes} with what the graft keeps for backward, except weights and x."""
    known = {p.untyped_storage().data_ptr() for p in graft.parameters()}
    known.add(x.untyped_storage().data_ptr())
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _memory_mib(layer: LayerInfo, graft: Graft, trial: _Trial) -> float:
    weights = sum(p.numel() * p.element_size() for p in graft.parameters())
    rows = layer.in_shape[0] / trial.x.shape[0] if layer.in_shape and len(trial.x) else 1.0
    kept = trial.saved_bytes * rows * max(1, layer.calls)
    return (weights * COPIES_IN_TRAINING + kept) / MIB


def _latency_ms(
    host: nn.Module, layer: LayerInfo, blueprint: str, graft: Graft, x: Tensor
) -> float:
    """Forward of the graft on the whole sample; the second of two, the first warms up."""
    with torch.no_grad():
        y = _output(host, layer, blueprint, x)
        y = y if layer.since else _run_grafts(host, x, y)
        for _ in range(2):
            _wait(x)
            started = time.perf_counter()
            graft.combine(x, y)
            _wait(x)
            elapsed = time.perf_counter() - started
    return elapsed * 1e3


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _dead_after_two_steps(graft: Graft, trial: _Trial) -> list[str]:
    """Names of new tensors that had no gradient in two steps, tried on a copy."""
    trial_graft = copy.deepcopy(graft)
    waiting = {name: p for name, p in trial_graft.named_parameters() if p.requires_grad}
    for _ in range(2):
        if not waiting:
            break
        torch.clear_autocast_cache()  # it has the weights of before the last step
        with torch.enable_grad():
            changed = trial_graft.combine(trial.x, trial.y)
        inputs = [p for p in trial_graft.parameters() if p.requires_grad]
        found = _gradients(changed, inputs, trial.cotangent)
        names = [name for name, p in trial_graft.named_parameters() if p.requires_grad]
        for name, parameter, gradient in zip(names, inputs, found, strict=True):
            if gradient is not None:
                parameter.data.sub_(gradient)
            if _alive(gradient):
                waiting.pop(name, None)
        trial_graft.on_step()
    return sorted(waiting)


def _made_up_cotangent(y: Tensor) -> Tensor:
    """Norm about 1. Not constant: a batch norm's output is orthogonal to a constant."""
    noise = _normal(y.shape, y.device, torch.float32)
    return (noise / math.sqrt(max(1, y.numel()))).to(y.dtype)


def _undo_is_exact(host: nn.Module, graft: Graft) -> bool:
    """Inserts and removes the graft on a copy of the host, and compares every tensor."""
    # Tensors with a history cannot be copied; the next forward pass computes them again.
    made = {id(tensor): tensor.detach().clone() for _, _, tensor in _made_tensors(host)}
    trial = copy.deepcopy(host, made)
    before = digest(trial)
    inside = trial._modules.get(SLOT_NAME) or nn.Module()
    inside.add_module("trial", copy.deepcopy(graft))
    fresh = SLOT_NAME not in trial._modules
    trial._modules[SLOT_NAME] = inside
    changed = digest(trial) != before or not any(True for _ in graft.parameters())
    del inside._modules["trial"]
    if fresh:
        del trial._modules[SLOT_NAME]
    return changed and digest(trial) == before


def _failures(certificate: Certificate, trial: _Trial, dead: list[str]) -> Iterator[str]:
    if not trial.same_form:
        yield "it changes the output's shape or dtype, or writes to the layer's tensors"
    elif not certificate.preserving:
        yield (
            f"it changes the output right after the graft by {certificate.max_abs_diff:.3g}; "
            f"the limit is {certificate.tolerance:.3g}"
        )
    if not certificate.live:
        yield "none of its tensors has a gradient in the first step"
    if dead:
        yield f"no gradient within two steps: {', '.join(dead)}"
    if not certificate.rng_neutral:
        yield "building or running it uses a global random stream"
    if certificate.undo_exact is False:
        yield "removing it does not restore the tensors"
    if certificate.host_untouched is False:
        yield "it changes the gradients of the layer's own weights or input"
    if certificate.parameters != certificate.parameters_declared:
        yield (
            f"it has {certificate.parameters} parameters, "
            f"but {certificate.parameters_declared} are declared"
        )


class Conv1D(nn.Module):
    """Stand-in for the transposed linear layer of GPT-2; the name is its kind."""

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features_in, features_out) * 0.02)
        self.bias = nn.Parameter(torch.zeros(features_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Opaque(nn.Module):
    """Stand-in for a layer that its description does not define: only the shapes are the same."""

    def __init__(self, layer: LayerInfo) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(layer.out_shape))
        self.same_rows = layer.in_shape[0] == layer.out_shape[0]

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        lift = x.mean() if x.is_floating_point() else x.new_zeros((), dtype=torch.float32)
        rows = x.shape[0] if self.same_rows else self.weight.shape[0]
        return self.weight[:rows] + lift.to(self.weight.dtype)


def _make_host(layer: LayerInfo) -> nn.Module:
    d_in, d_out = layer.features_in, layer.features_out
    if layer.kind in layout.LINEAR:
        return nn.Linear(d_in, d_out)
    if layer.kind in layout.TRANSPOSED_LINEAR:
        return Conv1D(d_in, d_out)
    if layout.is_convolution(layer) and layer.kernel_size:
        return _make_convolution(layer)
    if layer.kind.endswith("LayerNorm"):
        return nn.LayerNorm(d_out)
    if layer.kind.endswith("RMSNorm"):
        return nn.RMSNorm(d_out)
    if layer.kind == "Embedding":
        return nn.Embedding(max(1, layer.parameters // d_out), d_out)
    return Opaque(layer)


def _make_convolution(layer: LayerInfo) -> nn.Module:
    make: Any = getattr(nn, layer.kind)
    made: nn.Module = make(
        layer.features_in,
        layer.features_out,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )
    return made
