"""Statistics of what each layer gives to the next one.

A layer's own output is often not what the network uses: a Linear's output is read before the
activation function, where a layer whose units are all dead looks healthy. So a layer's activations
are read where they enter the next layer with parameters, if that input is made of this layer's
output alone:

    Linear - ReLU - Linear              after the ReLU, module or function
    Conv - BatchNorm - ReLU - Conv      the Conv where it enters the BatchNorm, the BatchNorm
                                        after the ReLU
    Conv - ReLU - MaxPool - Flatten - Linear    after the pooling; units are the Conv's channels
    Linear - ReLU - Dropout - Linear    after the dropout, as it enters
    Linear - GELU - Linear, + residual  the second Linear's own output, before the sum
    ... + residual - ReLU - Conv        after the ReLU, for the layer that ran last before the sum

Which input is made of which output is read from autograd's graph, so functions count like modules.
Where gradients do not reach a layer, and for a layer whose output enters no other, its own output
is read.

Shape legend: N samples, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esper.contracts import LayerInfo, Signal
from esper.fail_closed import FailClosed

Watcher = Callable[[Tensor, Tensor], None]
Watch = Callable[[str, Watcher], Callable[[], None]]

MAX_ELEMENTS = 1 << 16  # elements of a tensor that are read
DEAD_SHARE = 0.025
INACTIVE_SHARE = 0.01
EXTREME_SHARE = 0.01
LONGEST_WALK = 64  # nodes of autograd's graph between two layers
WATCHER = "activation watcher"
ACTIVATION_SIGNALS = (
    Signal.ACT_MEAN,
    Signal.ACT_STD,
    Signal.DEAD_FRACTION,
    Signal.SATURATION,
    Signal.ACT_ABS_MAX,
    Signal.INACTIVE_FRACTION,
)
_NO_ACTIVATIONS = "The layer's activations are not measured."
# Names of autograd's nodes, from their beginning.
_MIXING = ("Addmm", "Mm", "Bmm", "Baddbmm", "Mv", "Linear", "Convolution", "ScaledDotProduct")
_NONLINEAR = (
    "Relu", "LeakyRelu", "Prelu", "Rrelu", "Threshold", "Elu", "Gelu", "Silu", "Mish", "Glu",
    "Hardtanh", "Hardsigmoid", "Hardswish", "Softplus", "LogSigmoid", "Softshrink", "Hardshrink",
    "Tanh", "Sigmoid", "Clamp", "Softmax",
)  # fmt: skip


class ActivationReader:
    """Reads each layer's activations once, in the first forward pass that trains.

    Args:
        watch: ``watch(layer, fn)`` calls ``fn(x, y)`` at the layer's next forwards until the
            returned function is called, with the first tensors that go in and come out.
        layers: rows of the frames.
        clock: seconds, monotonic.
        fail_closed: where a watcher is reported that failed on an output.

    Attributes:
        seen: row -> float32 [6], the values of ``ACTIVATION_SIGNALS`` on the layer's device.
        seconds: how long reading took, inside the user's forward pass.
    """

    def __init__(
        self,
        watch: Watch,
        layers: Sequence[LayerInfo],
        clock: Callable[[], float],
        fail_closed: FailClosed,
    ) -> None:
        self.seen: dict[int, Tensor] = {}
        self.seconds = 0.0
        self._watch = watch
        self._layers = tuple(layers)
        self._clock = clock
        self._fail_closed = fail_closed
        self._undo: list[Callable[[], None]] = []
        self._outputs: dict[Any, int] = {}  # autograd's node of an output -> row, in order of run
        self._shapes: dict[int, torch.Size] = {}
        self._enters: set[int] = set()  # rows that were read at another layer's input before

    def arm(self) -> None:
        """Reads the next forward pass."""
        self.disarm()
        self.seen = {}
        self.seconds = 0.0
        for row, layer in enumerate(self._layers):
            closed = partial(
                self._fail_closed.run, part=WATCHER, layer=layer.name, unmeasured=_NO_ACTIVATIONS
            )
            reader = self._fail_closed.wrap(self._reader(row), **closed.keywords)
            undo = closed(partial(self._watch, layer.name, reader))
            if undo is not None:
                self._undo.append(undo)

    def disarm(self) -> None:
        """Removes the watchers; nothing of the user's graph is held any more."""
        for undo in self._undo:
            undo()
        self._undo = []
        # What entered no layer this time is read at its own output next time.
        self._enters -= self._shapes.keys() - self.seen.keys()
        self._outputs = {}
        self._shapes = {}

    def _reader(self, row: int) -> Watcher:
        def read(x: Tensor, y: Tensor) -> None:
            # Evaluation runs without gradients: its activations are not those that train.
            if not torch.is_grad_enabled():
                return
            started = self._clock()
            self._read(row, x, y)
            self.seconds += self._clock() - started

        return read

    def _read(self, row: int, x: Tensor, y: Tensor) -> None:
        producer = producer_of(x.grad_fn, self._outputs)
        if producer is not None and not (producer in self.seen and producer in self._enters):
            self._enters.add(producer)
            self._keep(producer, *self._as_units(x, row, producer))
        if row in self._shapes or not y.is_floating_point():
            return
        if y.layout is not torch.strided or y.is_nested or y.is_meta:
            raise TypeError(f"{_form_of(y)} has no mean over its units")
        self._shapes[row] = y.shape
        if y.grad_fn is not None:
            self._outputs[y.grad_fn] = row
        if row not in self._enters:
            self._keep(row, y, self._layers[row].channel_axis)

    def _keep(self, row: int, h: Tensor, channel_axis: int) -> None:
        if h.numel() and h.is_floating_point():
            with torch.no_grad():
                self.seen[row] = activation_statistics(h.detach(), channel_axis)

    def _as_units(self, x: Tensor, row: int, producer: int) -> tuple[Tensor, int]:
        """The input of layer ``row`` and the axis of its units.

        Channels that were flattened on the way are put back, so that a unit stays a channel.
        """
        shape = self._shapes[producer]
        first = self._layers[producer].channel_axis == 1 and len(shape) > 2
        if first and x.ndim == 2 and x.shape[1] % shape[1] == 0:
            return x.detach().reshape(x.shape[0], shape[1], -1), 1
        return x, self._layers[row].channel_axis


def producer_of(node: Any, outputs: dict[Any, int]) -> int | None:
    """Which layer's output a tensor is made of, by the graph that autograd keeps of it.

    Args:
        node: the tensor's ``grad_fn``.
        outputs: ``grad_fn`` of each layer's output -> row, in the order of execution.

    Returns:
        The row of the only layer on the way. Of several, which are summed before an activation
        function, the one that ran last. None where there is no such layer.
    """
    found: set[int] = set()
    mixed = is_rectified = has_branched = False
    visited: set[Any] = set()
    waiting = [node]
    while waiting and len(visited) < LONGEST_WALK:
        node = waiting.pop(0)
        if node is None or node in visited:
            continue
        visited.add(node)
        if node in outputs:
            found.add(outputs[node])
            continue
        leaf = getattr(node, "variable", None)
        name = node.name()
        if leaf is not None or name.startswith(_MIXING):
            # A gain or a bias changes no unit's place; a matrix mixes them.
            mixed = mixed or leaf is None or leaf.ndim > 1
            continue
        sources = [source for source, _ in node.next_functions if not _is_vector(source)]
        is_rectified = is_rectified or (not has_branched and name.startswith(_NONLINEAR))
        has_branched = has_branched or len(sources) > 1
        waiting += sources
    if len(found) == 1 and not mixed and not waiting:
        return found.pop()
    if not found or not is_rectified:
        return None
    order = {row: place for place, row in enumerate(outputs.values())}
    return max(found, key=order.__getitem__)


def _is_vector(node: Any) -> bool:
    """No node, or the leaf of a gain or a bias."""
    leaf = getattr(node, "variable", None)
    return node is None or (leaf is not None and leaf.ndim <= 1)


def _form_of(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "a nested tensor"
    return "a tensor on the meta device" if tensor.is_meta else f"a tensor of {tensor.layout}"


def activation_statistics(h: Tensor, channel_axis: int) -> Tensor:
    """float32 [6]: the values of ``ACTIVATION_SIGNALS`` for one tensor, which is not empty.

    A unit is dead when its mean |h| is at most 2.5 % of the layer's (Sokar et al. 2023,
    tau = 0.025), and inactive when at least 99 % of its values are exactly 0. Values within 1 % of
    the range from the largest or smallest one are saturated; for rectified values, whose zeros are
    normal, only the largest counts. Of a large tensor, evenly spread samples are read.

    Args:
        h: any float dtype.
        channel_axis: axis of the units: -1, or 1; where there is no such axis, the last.
    """
    units_last = h.movedim(1, -1) if channel_axis == 1 and h.ndim > 2 else h
    units = units_last.shape[-1] if h.ndim else 1
    h_NU = _thinned(units_last).reshape(-1, units).float()
    std, mean = torch.std_mean(h_NU, correction=0)
    low, high = torch.aminmax(h_NU)
    size_U = h_NU.abs().mean(0)
    largest = torch.maximum(high, -low)
    dead = (size_U <= DEAD_SHARE * size_U.mean()).float().mean()
    inactive = ((h_NU != 0).float().mean(0) <= INACTIVE_SHARE).float().mean()
    margin = EXTREME_SHARE * (high - low)
    extreme = (h_NU >= high - margin) | ((h_NU <= low + margin) & (low != 0))
    saturated = (extreme & (largest != 0)).float().mean()
    return torch.stack([mean, std, dead, saturated, largest, inactive])


def _thinned(units_last: Tensor) -> Tensor:
    """At most about ``MAX_ELEMENTS`` elements, with all units, from evenly spread places."""
    for axis in range(units_last.ndim - 1):
        places = units_last.shape[axis]
        room = max(1, MAX_ELEMENTS * places // max(1, units_last.numel()))
        if room < places:
            step = -(-places // room)
            units_last = units_last[(slice(None),) * axis + (slice(None, None, step),)]
    return units_last
