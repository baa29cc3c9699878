"""Reads one forward pass of a model that trains, and changes nothing.

A probe is armed for one step, costs tens of microseconds for each layer, and leaves no hook behind.
All reads are detached; no random number is drawn.

Shape legend: N rows of a batch, C classes or features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.diagnosis.facts import LayerPass, ModelPass
from esper.diagnosis.output_gradient import CLOSE, ELEMENTS, class_axes, with_loss
from esper.diagnosis.samples import is_readable, plain_kind_of, rows_of
from esper.diagnosis.sequences import (
    PLACES,
    TOKENS,
    FirstPlaces,
    ahead_of,
    alone,
    are_tokens,
    beside,
    classes_of,
    hidden_by,
    lag_of,
    masked_of,
)
from esper.grafting.compiled import Compilation, anything_was_compiled
from esper.grafting.hooks import PassingHook, register_alike
from esper.grafting.layers.graph import kind_of, layer_modules
from esper.grafting.slot import first_tensor, is_opaque
from esper.health.transfers import HostTransfer

EXTREME = 0.99
_SHAPING = (
    "View",
    "Unsafe",
    "Squeeze",
    "Unsqueeze",
    "Alias",
    "Reshape",
    "Select",
    "Clone",
    "ToCopy",
)


class ForwardProbe:
    """Reads one forward pass that trains: each layer's input and output, and the model's own.

    The gradient at the model's output shows the loss function, whatever computes it. Layers inside
    compiled code are not read: torch guards on the number of a layer's hooks.

    Args:
        closed: wraps a hook, so that nothing of it raises into the training.
    """

    def __init__(
        self,
        model: nn.Module,
        closed: Callable[..., Any],
        compilation: Compilation | None = None,
    ) -> None:
        self._model = model
        self._compilation = compilation or Compilation(model)
        self._closed = closed
        self._handles: dict[str, RemovableHandle] = {}  # by layer; empty name: the model's own
        self._armed = False
        self._layers: dict[str, tuple[str, bool, Tensor]] = {}
        self._linear: dict[int, str] = {}  # node of the gradient's graph -> linear layer
        self._follows: dict[str, str] = {}
        self._values: dict[str, int] = {}  # of each channel, by norm over the batch
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._gradient: Tensor | None = None
        self._tokens: Tensor | None = None
        self._targets: Tensor | None = None
        self._class_axes: Tensor | None = None
        self._knows_axes = False
        self._hides: Tensor | None = None  # bool: the places that attention does not read
        self._masked: Tensor | None = None
        self._form: tuple[int, ...] = ()  # of the tokens
        self._firsts: list[FirstPlaces] = []
        self._first_places: Tensor | None = None
        self._random: Tensor | None = None  # state of the generator at the first layer
        self._keeps_a_state = any(_keeps_a_state(module) for module in model.modules())
        self._end = ""
        self._axis: int | None = None

    @torch.no_grad()
    def arm(self) -> None:
        """For the next forward pass that trains."""
        self.disarm()
        self._layers, self._input, self._output, self._gradient = {}, None, None, None
        self._linear, self._follows, self._values = {}, {}, {}
        self._end, self._axis, self._tokens, self._targets = "", None, None, None
        self._class_axes = self._hides = self._masked = None
        self._firsts, self._first_places, self._random = [], None, None
        for name, module in layer_modules(self._model).items():
            self._register(name, module, partial(self._see_layer, name))
        if not is_opaque(self._model):
            self._register("", self._model, self._see_model)
        self._armed = True

    def disarm(self) -> None:
        self._armed = False
        for name in list(self._handles):
            # Code that was compiled with the hook would be compiled again without it. The hook of a
            # layer that was not seen may be in such code, where it does nothing.
            seen = name in self._layers if name else self._output is not None
            if seen or not anything_was_compiled():
                self._handles.pop(name).remove()

    def close(self) -> None:
        """Removes all hooks."""
        self._armed = False
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _register(self, name: str, module: nn.Module, see: Callable[..., None]) -> None:
        if name not in self._handles and not self._compilation.covers(name):
            hook = self._hook(see)
            self._handles[name] = register_alike("probe", module, hook)

    def collect(self, step: int, transfer: HostTransfer) -> Callable[[], ModelPass] | None:
        """Sends what was seen to the host; None where no forward pass was.

        Returns:
            What makes the result, once the numbers have arrived.
        """
        armed = self._armed
        self.disarm()
        if not armed or (not self._layers and self._output is None):
            return None
        transfer.add("layers", [numbers for _, _, numbers in self._layers.values()])
        sent = {
            "input": self._input, "output": self._output, "gradient": self._gradient,
            "tokens": self._tokens, "targets": self._targets, "first": self._first_places,
            "class axes": self._class_axes, "masked": self._masked,
        }  # fmt: skip
        forms = {name: tensor.shape for name, tensor in sent.items() if tensor is not None}
        for name in forms:
            transfer.add(name, [tensor.flatten() for tensor in (sent[name],) if tensor is not None])
        seen = ModelPass(step=step, layers=(), output_end=self._end, softmax_axis=self._axis)
        shape = self._shape if self._output is not None else ()
        return partial(
            _model_pass, seen, transfer, dict(self._layers), forms, shape, dict(self._follows),
            dict(self._values), self._form,
        )  # fmt: skip

    def _hook(self, see: Callable[..., None]) -> PassingHook:
        def seen(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._armed and torch.is_grad_enabled():
                with torch.no_grad():
                    see(module, args, kwargs, output)

        return PassingHook(self._closed(seen), takes=4)

    def _see_layer(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x, y = first_tensor((*args, *kwargs.values())), first_tensor(output)
        if name in self._layers or x is None or y is None or not is_readable(y):
            return
        if not self._layers and isinstance(module, nn.Embedding):
            self._random = _generator_state(y.device)
        if self._hides is None and isinstance(module, nn.MultiheadAttention):
            self._hides = hidden_by(kwargs)
        numbers = _input_numbers(x) if is_readable(x) else _unknown_numbers(y)
        std = rows_of(y).std(correction=0).reshape(1)
        joined = torch.cat([numbers.to(y.device, non_blocking=True), std])
        self._layers[name] = plain_kind_of(module), module.training, joined
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and y.ndim > 1:
            self._values[name] = y.numel() // max(1, y.shape[1])
        if kind_of(module) == "Linear":
            # By its number: torch makes a node's Python object anew each time it is asked for, so
            # that its id is soon that of another node.
            if x.grad_fn is not None:
                self._follows[name] = self._linear.get(x.grad_fn._sequence_nr(), "")
            if y.grad_fn is not None:
                self._linear[y.grad_fn._sequence_nr()] = name

    def _see_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._output is not None:
            return
        x, y = first_tensor((*args, *kwargs.values())), output_of(output)
        if x is not None and is_readable(x):
            self._input = rows_of(x).clone()
        hides, self._hides = hidden_by(kwargs) if self._hides is None else self._hides, None
        if x is not None and hides is not None and are_tokens(x) and hides.shape == x.shape:
            self._see_mask(x, hides)
        if y is None or not is_readable(y) or not y.requires_grad or not y.ndim:
            return
        self._output, self._shape = rows_of(y).clone(), tuple(y.shape)
        self._end, self._axis = end_of(y), softmax_axis_of(y)
        if x is not None and are_tokens(x) and y.shape[:-1] in (x.shape, (x.numel(),)):
            others, self._form = beside(x, args, kwargs), tuple(x.shape)
            self._tokens = alone(x, others or []).flatten()[:TOKENS].float()
            if others is not None and not self._keeps_a_state:
                self._firsts = self._first_places_of(x, y.reshape(*x.shape, -1), others)
        y.register_hook(self._closed(self._see_gradient))  # type: ignore[no-untyped-call]

    def _first_places_of(self, x: Tensor, y: Tensor, others: list[Tensor]) -> list[FirstPlaces]:
        """Along both axes: the targets show which of them is that of the places."""
        kind = y.device.type
        is_cast = torch.is_autocast_enabled(kind)
        used = [y.dtype, torch.get_autocast_dtype(kind)] if is_cast else [y.dtype]
        used += [p.dtype for p in self._model.parameters() if p.is_floating_point()][:1]
        coarsest = max(used, key=lambda dtype: torch.finfo(dtype).eps)
        random = self._draws(y.device)
        return [
            FirstPlaces(x, y, others, axis, random=random, precision=coarsest) for axis in (0, 1)
        ]

    def _draws(self, device: torch.device) -> bool:
        """Random numbers were drawn behind the table, or nobody knows."""
        before, now = self._random, _generator_state(device)
        return before is None or now is None or not torch.equal(before, now)

    def _see_gradient(self, gradient: Tensor) -> None:
        if self._gradient is None and is_readable(gradient):
            self._gradient = rows_of(gradient.detach()).clone()
            self._see_axes(gradient)
            if self._tokens is not None:
                gradient = gradient.detach()
                self._targets = classes_of(gradient.flatten(0, -2)[:PLACES])
                each = gradient.reshape(*self._form, -1)
                if self._firsts:
                    found = [places.read(each) for places in self._firsts]
                    self._first_places = torch.nn.utils.rnn.pad_sequence(
                        [numbers_4B.T for numbers_4B in found], padding_value=-1.0
                    ).permute(1, 2, 0)

    def _see_mask(self, tokens: Tensor, hides: Tensor) -> None:
        if tokens.device == hides.device:  # a model that is spread over devices has it on another
            pair = [tokens.flatten()[:TOKENS], hides.flatten()[:TOKENS]]
            self._masked = torch.stack(pair).float()

    def _see_axes(self, gradient: Tensor) -> None:
        """Once: a script does not change how it reads the output."""
        if not self._knows_axes and gradient.ndim >= 3 and gradient.dtype is torch.float32:
            self._knows_axes = True
            if 0 < gradient[0].numel() <= ELEMENTS:
                self._class_axes = class_axes(gradient).float()


def _keeps_a_state(module: nn.Module) -> bool:
    """Of the batches before, from which it knows more than the tokens of this one."""
    if isinstance(module, nn.RNNBase):
        return not module.bidirectional
    return isinstance(module, nn.RNNCellBase)


def _generator_state(device: torch.device) -> Tensor | None:
    """uint8, on the host; None where it is not read."""
    if device.type == "cpu":
        return torch.get_rng_state()
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.get_rng_state(device)


def output_of(output: Any) -> Tensor | None:
    """The model's output: a tensor, the first of several, or the ``logits`` of a mapping."""
    if isinstance(output, Mapping):
        named = output.get("logits")
        output = named if named is not None else tuple(output.values())
    return first_tensor(output)


def end_of(output: Tensor) -> str:
    """Name of the function that computed the output, without what only changes its shape."""
    node = output.grad_fn
    for _ in range(6):
        if node is None:
            return ""
        if not node.name().startswith(_SHAPING):
            return node.name()
        node = node.next_functions[0][0] if node.next_functions else None
    return ""


def softmax_axis_of(output: Tensor) -> int | None:
    """The axis, counted from the first, where a softmax is the last function of all."""
    node = output.grad_fn
    if node is None or not node.name().startswith(("SoftmaxBackward", "LogSoftmaxBackward")):
        return None
    axis = getattr(node, "_saved_dim", None)
    if not isinstance(axis, int):
        return None
    # torch saves a negative axis as a number without a sign.
    axis = axis - 2**64 if axis >= 2**63 else axis
    return axis % max(1, output.ndim)


def _input_numbers(x: Tensor) -> Tensor:
    """float [4]: std, spread over the rows, share of zeros, share of extremes."""
    rows = rows_of(x)
    rms = rows.square().mean().sqrt()
    spread = (rows - rows.mean(0)).square().mean().sqrt() / rms.clamp_min(1e-30)
    if len(rows) < 2:
        spread = torch.full_like(rms, math.nan)
    zeros, low, high = (rows == 0).float().mean(), rows.min(), rows.max()
    # Behind a ReLU or in one-hot data there are zeros, and those are no end of a range.
    sigmoid = ((rows > EXTREME) | (rows < 1 - EXTREME)).float().mean()
    tanh = (rows.abs() > EXTREME).float().mean()
    unknown = torch.full_like(tanh, math.nan)
    extremes = torch.where(low > 0, sigmoid, torch.where(low < 0, tanh, unknown))
    extremes = torch.where((high <= 1) & (low >= -1), extremes, unknown)
    return torch.stack([rows.std(correction=0), spread, zeros, extremes])


def _unknown_numbers(y: Tensor) -> Tensor:
    """As :func:`_input_numbers`, of an input that cannot be read; ``y`` is the layer's output."""
    return torch.full((4,), math.nan, dtype=torch.float32, device=y.device)


def _model_pass(
    seen: ModelPass,
    transfer: HostTransfer,
    layers: Mapping[str, tuple[str, bool, Tensor]],
    forms: Mapping[str, torch.Size],
    output_shape: tuple[int, ...],
    follows: Mapping[str, str],
    values: Mapping[str, int],
    tokens_form: tuple[int, ...],
) -> ModelPass:
    """From what has arrived on the host.

    Args:
        forms: shapes of the tensors that were sent whole.
        follows: linear layer -> the linear layer whose output it reads.
        values: norm over the batch -> values of each channel.
        tokens_form: shape of the model's input, where that is tokens.
    """
    host = {
        name: torch.from_numpy(transfer.take(name, not_a_number=math.nan)).float().reshape(form)
        for name, form in forms.items()
    }
    passes = tuple(
        replace(entry, follows=follows.get(entry.layer, ""), values=values.get(entry.layer, 0))
        for entry in _layer_passes(transfer, layers)
    )
    seen = replace(seen, layers=passes)
    if "input" in host:
        x = host["input"]
        finite = bool(x.isfinite().all())
        rms = float(x.square().mean().sqrt()) if finite else math.inf
        seen = replace(seen, input_rms=rms, input_finite=finite)
    if "output" in host:
        seen = _with_output(seen, host["output"], output_shape, host.get("gradient"))
    if "class axes" in host:
        *own, mixed = host["class axes"].bool().tolist()
        found = tuple(axis for axis, chooses in enumerate(own, 1) if chooses)
        seen = replace(seen, class_axes=found, mixes_axes=mixed)
    if "masked" in host:
        seen = replace(seen, masked=masked_of(host["masked"]))
    if "targets" in host:
        tokens, targets = host["tokens"].long(), host["targets"].long()
        lag, axis = lag_of(tokens, targets, tokens_form)
        seen = replace(seen, lag=lag)
        if lag == 1 and "first" in host:
            seen = replace(seen, ahead=ahead_of(host["first"][axis]))
    return seen


def _layer_passes(
    transfer: HostTransfer, layers: Mapping[str, tuple[str, bool, Tensor]]
) -> tuple[LayerPass, ...]:
    if not layers:
        return ()
    numbers = transfer.take("layers", not_a_number=math.nan).tolist()
    return tuple(
        LayerPass(name, kind, std, spread, zeros, extremes, out_std, training)
        for (name, (kind, training, _)), (std, spread, zeros, extremes, out_std) in zip(
            layers.items(), numbers, strict=True
        )
    )


def _with_output(
    seen: ModelPass, y_NC: Tensor, shape: tuple[int, ...], gradient_NC: Tensor | None
) -> ModelPass:
    size = float(y_NC.abs().max())
    spread = float((y_NC.amax(0) - y_NC.amin(0)).max()) / max(size, 1e-30)
    seen = replace(
        seen,
        output_shape=shape,
        row_sum=float(y_NC.sum(1).mean()) if shape[-1] == y_NC.shape[1] else math.nan,
        output_low=float(y_NC.min()),
        output_high=float(y_NC.max()),
        output_spread=spread if len(y_NC) > 1 else math.nan,
        log_sum_near_zero=float(y_NC.logsumexp(1).abs().max()) < CLOSE,
    )
    if gradient_NC is None or gradient_NC.shape != y_NC.shape or shape[-1] != y_NC.shape[1]:
        return seen
    return with_loss(seen, y_NC.double(), gradient_NC.double(), shape)
