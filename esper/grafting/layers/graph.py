"""The layer graph, traced from forward passes and never guessed from names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from esper.blueprints.activations import ACTIVATIONS, activation_between, node_number
from esper.blueprints.layout import axes_of, channel_axis_of
from esper.contracts import MAX_NAME_LENGTH, LayerInfo
from esper.fail_closed import FailClosed
from esper.grafting.compiled import is_compiled
from esper.grafting.hooks import PassingHook, register_alike
from esper.grafting.layers.attention import TimeAxis, cached_part, looks_ahead
from esper.grafting.slot import (
    CONTAINERS,
    SLOT_NAME,
    first_tensor,
    is_opaque,
    slots,
)
from esper.grafting.spans import checkpointed_region
from esper.grafting.tensors.random_streams import kept_streams
from esper.grafting.tensors.saved_values import write
from esper.sharding import Kind, Part, original_name, parts_of, why_no_graft
from esper.sharding import kind_of as sharding_of

NEVER_RAN = "it did not run in the traced forward pass"
RECORDER = "layer recorder"
ROWS_COMPARED = 4  # of a layer's output, to tell the activation behind it
_NO_SHAPES = "Esper does not know the layer's shapes, so it takes no graft."
_NO_ORDER = "Esper does not know in which order the layers run."
_QUANTISERS = frozenset({"weight_fake_quant", "activation_post_process"})  # torch.ao's names
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(slots=True)
class _Sighting:
    """What the forward passes have shown about one layer so far."""

    in_shape: tuple[int, ...] = ()
    out_shape: tuple[int, ...] = ()
    input_is_float: bool = False
    reason: str = ""
    is_open: bool = False  # a later call may show more
    order: int = 0
    calls: int = 0  # in the first pass that called it
    recomputed: int = 0  # region of activation checkpointing
    activation: str = ""  # between the layer before and this one
    compared: dict[str, Tensor] = field(default_factory=dict)  # name -> 0-d bool, its input fits
    feeds: dict[str, None] = field(default_factory=dict)  # a set that keeps its order


def layer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """name -> module of all layers: attention, and what has parameters and no layer inside.

    A layer may contain a dropout, an activation or an observer of quantisation. A module with two
    names appears under its first name.
    """
    found = {}
    inside_slots = {inner for _, _, slot in slots(model) for inner in slot.modules()}
    flat = _flat_parts(model)
    for name, module in model.named_modules():
        if module in inside_slots or not _is_candidate(module, name):
            continue
        if _is_leaf(module, module in flat) or (not flat and _has_only_helpers(module)):
            found[original_name(name)] = module
    return found


def _flat_parts(model: nn.Module) -> dict[nn.Module, list[Part]]:
    """Modules whose parameters another tensor holds, in FSDP's wrapper or ZeRO-3, and these."""
    found: dict[nn.Module, list[Part]] = {}
    if sharding_of(model) in (Kind.FSDP, Kind.ZERO):
        for part in parts_of(model):
            for owner in part.owners:
                found.setdefault(owner, []).append(part)
    return found


def why_never_graftable(
    model: nn.Module, name: str, layers: Mapping[str, nn.Module] | None = None
) -> str:
    """Why this module can never have a graft; empty if it can.

    Args:
        layers: the result of :func:`layer_modules`, for a caller that asks about many modules.
    """
    module = model.get_submodule(name)
    if not name:
        return "it is the whole model; name one of its layers"
    if is_opaque(module):
        return "it is compiled by TorchScript, which runs no hooks and takes no graft"
    if isinstance(module, CONTAINERS):
        return "a container computes nothing itself; name one of the layers in it"
    if len(name) > MAX_NAME_LENGTH:
        return f"its name is longer than {MAX_NAME_LENGTH} characters"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return (
            "its parent attention reads its weight without calling it, so a graft would never run"
        )
    if not _QUANTISERS.isdisjoint(module._modules):
        return "it is prepared for quantisation, and torch's convert would lose a graft"
    if _is_adapter(model, name):
        return "it is part of a PEFT adapter, whose merge reads its weights and would lose a graft"
    if name not in (layer_modules(model) if layers is None else layers):
        if any(True for _ in module.children()):
            return f"a {kind_of(module)} contains other layers; name one of them"
        return f"a {kind_of(module)} has no parameters; name a layer that has some"
    return ""


def _is_adapter(model: nn.Module, name: str) -> bool:
    """A layer inside the dictionaries of one of PEFT's layers, not the layer that it adapts."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(parent, nn.ModuleDict):
        return False
    owner = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    return any(kind.__name__ == "BaseTunerLayer" for kind in type(owner).__mro__)


def kind_of(module: nn.Module) -> str:
    """Class name; for a parametrised or sharded layer (weight norm, FSDP2), the original class."""
    kinds = [kind.__name__ for kind in type(module).__mro__]
    # fully_shard gives the layer a class of its own: FSDPLinear, FSDPModule, Linear, ...
    name = kinds[kinds.index("FSDPModule") + 1] if "FSDPModule" in kinds else kinds[0]
    return name.removeprefix("Parametrized") if hasattr(module, "parametrizations") else name


class LayerRecorder:
    """Traces the layer graph in the next forward passes of ``model``, then removes its hooks.

    The model's results stay the same to the bit: the hooks only read shapes.

    Args:
        forwards: how many full passes of the model to trace.
        fail_closed: where a hook is reported that could not be installed, or failed.
    """

    def __init__(
        self, model: nn.Module, *, forwards: int = 1, fail_closed: FailClosed | None = None
    ) -> None:
        self._model = model
        self._fail_closed = fail_closed or FailClosed()
        self._modules = layer_modules(model)
        self._flat = _flat_parts(model)
        self._refusal = why_no_graft(sharding_of(model))
        self._sightings: dict[str, _Sighting] = {}
        self._calls: Counter[str] = Counter()
        self._last_output: Tensor | None = None  # a few rows, until the next layer has run
        # Number of the same output's node in the graph of the gradient. The node itself would keep
        # all activations of a forward pass that raised, such as for want of memory.
        self._last_node: int | None = None
        self._regions: list[object] = []
        self._previous = ""
        self._in_pass = False
        self._unreadable = False  # in this pass, an output had no shape that could be read
        self._remaining = forwards
        self._retired = False
        self._handles: list[RemovableHandle] = []
        self._watch()

    @property
    def done(self) -> bool:
        """True after enough forward passes, or after :meth:`stop`."""
        return self._retired or not self._handles

    def retire(self) -> None:
        """Records no more. Hooks in compiled parts stay: to remove them would compile again."""
        self._end_pass()
        self._retired = True
        if not any(map(is_compiled, self._model.modules())):
            self.stop()

    def stop(self) -> None:
        """Removes the hooks now."""
        self._end_pass()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def layers(self) -> tuple[LayerInfo, ...]:
        """All layers in order of execution; those that never ran come last, with the reason."""
        ahead = looks_ahead(self._model)
        shapes = {name: sighting.in_shape for name, sighting in self._sightings.items()}
        time = TimeAxis(self._model, shapes)
        infos = [
            self._describe(name, module, ahead, time.of(name, shapes.get(name, ())))
            for name, module in self._modules.items()
        ]
        return tuple(sorted(infos, key=lambda info: (not info.in_shape, info.order)))

    def _watch(self) -> None:
        root = self._model
        self._install("", lambda hook: root.register_forward_pre_hook(hook), self._start_pass)
        for name, module in self._modules.items():
            register = partial(register_alike, "record", module)
            self._install(name, register, self._see_as(name), takes=4)
        self._install("", lambda hook: root.register_forward_hook(hook), self._finish_pass)

    def _install(
        self,
        layer: str,
        register: Callable[[Callable[..., None]], RemovableHandle],
        hook: Callable[..., None],
        takes: int = 0,
    ) -> None:
        """Registers one hook that no compiled code contains; some modules accept none."""
        closed = partial(
            self._fail_closed.run,
            part=RECORDER,
            layer=layer,
            unmeasured=_NO_SHAPES if layer else _NO_ORDER,
        )
        quiet = self._fail_closed.wrap(hook, **closed.keywords)
        handle = closed(lambda: register(PassingHook(quiet, takes)))
        if handle is not None:
            self._handles.append(handle)

    def _start_pass(self, module: nn.Module, args: Any) -> None:
        if self._retired:
            return
        if self._in_pass:
            self._calls.clear()  # the last pass raised, so its counts are incomplete
        self._end_pass()  # layers that were called directly since the last full pass
        self._in_pass = True

    def _finish_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._retired:
            return
        self._in_pass = False
        self._end_pass()
        if self._unreadable:
            # A padded batch goes through an encoder as a nested tensor in eval mode only; the first
            # pass that trains will show the shapes.
            self._unreadable = False
            return
        if not self._sightings:  # a forward that is a generator runs its layers later
            return
        self._remaining -= 1
        if self._remaining <= 0:
            self.retire()

    def _end_pass(self) -> None:
        for name, calls in self._calls.items():
            sighting = self._sightings[name]
            sighting.calls = sighting.calls or calls
        self._calls.clear()
        self._previous = ""
        self._last_output = self._last_node = None
        self._regions.clear()

    def _see_as(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._retired:
                return
            known = self._sightings.get(name)
            if known is None or known.is_open:
                seen = _look(args, kwargs, output)
                seen.order = len(self._sightings) if known is None else known.order
                seen.recomputed = self._region()
                self._look_for_activation(seen, first_tensor((*args, *kwargs.values())))
                self._unreadable |= seen.is_open
                self._sightings[name] = seen
            if self._previous and self._previous != name:
                self._sightings[self._previous].feeds[name] = None
            self._calls[name] += 1
            self._previous = name
            result = first_tensor(output)
            self._last_node = None if result is None else node_number(result.grad_fn)
            self._last_output = None if torch.is_grad_enabled() else first_rows(result)

        return see

    def _look_for_activation(self, seen: _Sighting, now: Tensor | None) -> None:
        """Which function of the last layer's output is the input of this one.

        The graph of the gradient tells it without a look at the numbers, which would wait for a
        GPU; a pass without gradients has none, so there the numbers are compared. What lies behind
        frozen layers in a pass that trains stays unknown.
        """
        if now is None:
            return
        if now.grad_fn is not None:
            if self._last_node is not None:
                seen.activation = activation_between(self._last_node, now.grad_fn)
            return
        before, rows = self._last_output, first_rows(now)
        if torch.is_grad_enabled() or before is None or rows is None:
            return
        if before.shape == rows.shape and before.dtype == rows.dtype:
            with torch.no_grad():
                seen.compared = {
                    name: (function(before) == rows).all() for name, function in ACTIVATIONS.items()
                }

    def _region(self) -> int:
        region = checkpointed_region()
        if region is None:
            return 0
        if region not in self._regions:
            self._regions.append(region)
        return self._regions.index(region) + 1

    def _describe(
        self, name: str, module: nn.Module, looks_ahead: bool, sequence_axis: int
    ) -> LayerInfo:
        sighting = self._sightings.get(name, _Sighting(reason=NEVER_RAN))
        reason = why_never_graftable(self._model, name, self._modules)
        reason = reason or self._refusal or sighting.reason
        attention = {
            "looks_ahead": looks_ahead,
            "sequence_axis": sequence_axis,
            **cached_part(self._model, name),
        }
        return _layer_info(name, module, sighting, reason, self._flat.get(module, ()), **attention)


def first_rows(tensor: Tensor | None) -> Tensor | None:
    """A copy of a few rows, which a later operation may write to; None: not such a tensor."""
    if tensor is None or tensor.is_nested or tensor.layout is not torch.strided:
        return None
    if tensor.dim() < 2 or not tensor.is_floating_point():
        return None
    return tensor.detach()[:ROWS_COMPARED].clone()


def trace_layers(
    model: nn.Module, forward: Callable[[], Any] | None = None
) -> tuple[LayerInfo, ...]:
    """The layer graph of ``model``.

    Args:
        forward: runs the model once, for example ``lambda: model(batch)``. Gradients are off
            during this run, and buffers and random streams are restored afterwards. Without it,
            only what the modules themselves define is known, for a batch of one row.
    """
    if forward is None:
        ahead, layers = looks_ahead(model), layer_modules(model)
        flat, refusal = _flat_parts(model), why_no_graft(sharding_of(model))
        return tuple(
            _describe_unseen(model, name, layers, ahead, flat.get(module, ()), refusal)
            for name, module in layers.items()
        )
    recorder = LayerRecorder(model)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad(), kept_streams():
            forward()
    finally:
        recorder.stop()
        with torch.no_grad():
            for buffer, before in buffers:
                if buffer.shape != before.shape:  # an observer of quantisation resizes its own
                    buffer.resize_(before.shape)
                write(buffer, before)
    return recorder.layers()


def _is_candidate(module: nn.Module, name: str) -> bool:
    if is_opaque(module) or ".parametrizations" in f".{name}":
        return False
    return isinstance(module, nn.MultiheadAttention) or not isinstance(module, CONTAINERS)


def _is_leaf(module: nn.Module, has_flat: bool) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    return not _children(module) and (has_flat or any(True for _ in _own_parameters(module)))


def _has_only_helpers(module: nn.Module) -> bool:
    """It has parameters itself, and what it contains has none.

    Where other tensors hold the parameters, as in FSDP's wrapper, this would be true of each block.
    """
    inside = _children(module)
    if not inside or not any(p is not None for p in module._parameters.values()):
        return False
    return all(next(child.parameters(), None) is None for child in inside.values())


def _children(module: nn.Module) -> dict[str, nn.Module]:
    around = {SLOT_NAME, "parametrizations"}
    named = module._modules.items()
    return {name: child for name, child in named if child is not None and name not in around}


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    prefix = f"{SLOT_NAME}."
    return [p for name, p in module.named_parameters() if not name.startswith(prefix)]


def _look(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> _Sighting:
    x, y = first_tensor((*args, *kwargs.values())), first_tensor(output)
    if x is None or y is None:
        return _Sighting(reason="its input or output is not a plain tensor")
    for tensor, which in ((x, "input"), (y, "output")):
        odd = _why_no_shape(tensor)
        if odd:
            return _Sighting(reason=f"its {which} is {odd}", is_open=True)
    if not y.is_floating_point():
        return _Sighting(reason=f"its output is {y.dtype}, not floating-point numbers")
    return _Sighting(
        in_shape=tuple(x.shape),
        out_shape=tuple(y.shape),
        input_is_float=x.is_floating_point(),
    )


def _why_no_shape(tensor: Tensor) -> str:
    """Empty for a tensor whose shape is that of a block of numbers."""
    if tensor.is_nested:
        return "a nested tensor"
    return "" if tensor.layout is torch.strided else f"a tensor of layout {tensor.layout}"


def _layer_info(
    name: str,
    module: nn.Module,
    sighting: _Sighting,
    reason: str,
    flat: Sequence[Part],
    **attention: Any,
) -> LayerInfo:
    kind = kind_of(module)
    axis = channel_axis_of(kind)
    parameters = [part.holder for part in flat] or _own_parameters(module)
    sizes = [part.shape.numel() for part in flat] or map(count_of, parameters)
    first = next((p for p in parameters if p.is_floating_point()), None)
    reason = reason or _why_unwritten(parameters)
    if first is None and not reason:
        reason = "its weights are not floating-point numbers"
    reason = reason or _why_unbatched(kind, sighting)
    return LayerInfo(
        name=name,
        kind=kind,
        in_shape=sighting.in_shape,
        out_shape=sighting.out_shape,
        dtype=str(torch.float32 if first is None else first.dtype).removeprefix("torch."),
        parameters=sum(sizes),
        graftable=not reason,
        reason=reason,
        features_in=_channels(sighting.in_shape, axis) if sighting.input_is_float else 0,
        features_out=_channels(sighting.out_shape, axis),
        channel_axis=axis,
        device="cpu" if first is None else str(first.device),
        order=sighting.order,
        calls=max(1, sighting.calls),
        trainable=any(p.requires_grad for p in parameters),
        activation=sighting.activation
        or next((name for name, fits in sighting.compared.items() if bool(fits)), ""),
        recomputed=sighting.recomputed,
        feeds=tuple(sighting.feeds),
        **_geometry(module),
        **attention,
    )


def _why_unbatched(kind: str, sighting: _Sighting) -> str:
    if sighting.out_shape and len(sighting.out_shape) < axes_of(kind):
        return "it ran without a batch axis in the traced forward pass"
    return "" if sighting.out_shape else NEVER_RAN


def _channels(shape: tuple[int, ...], axis: int) -> int:
    return shape[axis] if len(shape) > max(axis, 0) else 0


def _geometry(module: nn.Module) -> dict[str, Any]:
    """Kernel, stride, padding and dilation of a convolution that pads symmetrically with zeros."""
    if not isinstance(module, _CONVOLUTIONS) or module.padding_mode != "zeros":
        return {}
    padding = _symmetric_padding(module)
    if padding is None:
        return {"groups": module.groups}
    return {
        "kernel_size": tuple(module.kernel_size),
        "stride": tuple(module.stride),
        "padding": padding,
        "dilation": tuple(module.dilation),
        "groups": module.groups,
    }


def _symmetric_padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...] | None:
    if not isinstance(module.padding, str):
        return tuple(module.padding)
    if module.padding == "valid":
        return tuple(0 for _ in module.kernel_size)
    totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return None if any(total % 2 for total in totals) else tuple(total // 2 for total in totals)


def _describe_unseen(
    model: nn.Module,
    name: str,
    layers: Mapping[str, nn.Module],
    looks_ahead: bool,
    flat: Sequence[Part],
    refusal: str,
) -> LayerInfo:
    module = layers[name]
    sighting = _sighting_of_weights(module)
    reason = why_never_graftable(model, name, layers) or refusal
    attention = {"looks_ahead": looks_ahead, **cached_part(model, name)}
    return _layer_info(name, module, sighting, reason, flat, **attention)


def _sighting_of_weights(module: nn.Module) -> _Sighting:
    """Shapes for one row where the weights define them; otherwise empty."""
    kind = kind_of(module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return _Sighting()
    if isinstance(module, nn.Linear):
        return _Sighting((1, weight.shape[1]), (1, weight.shape[0]), True)
    if kind == "Conv1D":
        return _Sighting((1, weight.shape[0]), (1, weight.shape[1]), True)
    if kind.endswith(("LayerNorm", "RMSNorm")) and weight.dim() == 1:
        return _Sighting((1, weight.numel()), (1, weight.numel()), True)
    return _Sighting()


def count_of(parameter: Tensor) -> int:
    """Number of elements; 0 while a lazy module has not given it a shape."""
    return 0 if is_lazy(parameter) else parameter.numel()


def _why_unwritten(parameters: Iterable[Tensor]) -> str:
    """Why the weights hold no numbers; empty if they do."""
    if any(map(is_lazy, parameters)):
        return "its parameters have no shape before the first forward pass (a lazy module)"
    if any(parameter.is_meta for parameter in parameters):
        return "its parameters are on the meta device and hold no numbers"
    return ""
