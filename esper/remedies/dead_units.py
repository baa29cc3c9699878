"""Units that do not fire any more, and their new start.

A unit of a layer fires in a forward pass where its largest |h| in the batch is more than a small
share of what is usual in the layer. How long a living unit is silent between two firings differs
from unit to unit, so each unit is judged by its own silences (self-normalised resets, Farias and
Jozefiak 2024, arXiv 2410.20098): it is dead when a silence as long as its present one would be
very unlikely for it.

Shape legend: N rows, C units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import layout
from esper.exceptions import GraftError
from esper.grafting.changes.certify import put_back
from esper.grafting.companions.companion import with_companions
from esper.grafting.layers.graph import kind_of
from esper.grafting.remedies import is_tied
from esper.grafting.slot import SLOT_NAME, watch
from esper.grafting.surroundings import Surroundings
from esper.health.activations import producer_of
from esper.remedies.base import Batch

FIRES_ABOVE = 0.025  # of the layer's mean largest |h|; ReDo's tau (arXiv 2302.12902)
UNLIKELY = 1e-3  # chance of a silence that is taken for death
FEWEST_PASSES = 20  # no shorter silence is


class FiringTimes:
    """How often each unit of a layer fires, and since when it is silent.

    The silences of a unit that fires with probability p in a pass are geometric: one of t passes
    or more has the chance (1 - p)^t. Units that fire in bursts have longer ones, so twice the
    longest silence that a unit has ended counts as usual for it too.
    """

    def __init__(self, width: int) -> None:
        self._passes = 0
        self._fired_C = torch.zeros(width, dtype=torch.float32, device="cpu")
        self._span_C = torch.zeros_like(self._fired_C)  # passes until the last firing
        self._silent_C = torch.zeros_like(self._fired_C)
        self._longest_C = torch.zeros_like(self._fired_C)  # silence that ended

    def observe(self, fires_C: Tensor) -> None:
        """One forward pass; bool [C]."""
        if self._fired_C.device != fires_C.device:
            for name in ("_fired_C", "_span_C", "_silent_C", "_longest_C"):
                setattr(self, name, getattr(self, name).to(fires_C.device))
        self._passes += 1
        self._longest_C = torch.where(
            fires_C, torch.maximum(self._longest_C, self._silent_C), self._longest_C
        )
        self._fired_C += fires_C
        self._span_C = torch.where(fires_C, float(self._passes), self._span_C)
        self._silent_C = torch.where(fires_C, 0.0, self._silent_C + 1)

    def dead(self) -> Tensor:
        """bool [C]: units whose present silence would be very unlikely for them."""
        known_C = self._fired_C > 0
        rate_C = (self._fired_C + 1) / (self._span_C + 2)
        # A unit that never fired has no silences of its own: the slowest living unit's are used.
        slowest = torch.where(known_C, rate_C, 1.0).min()
        rate_C = torch.where(known_C, rate_C, slowest).clamp(max=1 - 1e-6)
        usual_C = math.log(UNLIKELY) / torch.log1p(-rate_C)
        usual_C = torch.maximum(usual_C, 2 * self._longest_C).clamp(min=FEWEST_PASSES)
        return self._silent_C > usual_C

    def forget(self, units: list[int]) -> None:
        """These units begin anew."""
        index = torch.tensor(units, device=self._fired_C.device)
        for counter in (self._fired_C, self._span_C, self._silent_C, self._longest_C):
            counter.index_fill_(0, index, 0.0)


def fires(h: Tensor, axis: int, width: int) -> Tensor:
    """bool [C]: which units fire in one call of a layer whose input is ``h``."""
    rows_NC = h.detach().movedim(axis, -1).reshape(-1, width)
    largest_C = rows_NC.abs().amax(0).float()
    return (largest_C > FIRES_ABOVE * largest_C.mean()) & (largest_C > 0)


def silent_units(model: nn.Module, name: str, width: int, sample: Batch) -> list[int]:
    """Units that do not fire for one batch, at the input of the layer ``name``.

    Raises:
        GraftError: the layer did not run.
    """
    reader = model.get_submodule(name)
    axis = layout.channel_axis_of(kind_of(reader))
    seen: list[Tensor] = []
    with watched(model, name, lambda x, _: seen.append(fires(x, axis, width))):
        answer(model, sample)
    if not seen:
        raise GraftError("the next layer did not run with this sample", layer=name)
    return (~torch.stack(seen).any(0)).nonzero().flatten().tolist()


def reader_of(model: nn.Module, layer: str, sample: Batch) -> str:
    """The only layer with parameters whose input is made of ``layer``'s output alone.

    Raises:
        GraftError: there is none, or there are several; the message says so.
    """
    outputs: dict[Any, int] = {}
    names = [
        name
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
        and SLOT_NAME not in name.split(".")
    ]
    found: list[str] = []

    def look(row: int, x: Tensor, y: Tensor) -> None:
        producer = producer_of(x.grad_fn, outputs)
        if producer is not None and names[producer] == layer:
            found.append(names[row])
        if y.grad_fn is not None:
            outputs[y.grad_fn] = row

    ends = [watch(model, name, partial(look, row)) for row, name in enumerate(names)]
    try:
        with torch.enable_grad(), put_back(model, False):
            sample.run(model)
    finally:
        for end in ends:
            end()
    readers = list(dict.fromkeys(found))
    if len(readers) != 1:
        which = ", ".join(readers) or "none was found"
        raise GraftError(
            f"exactly one layer must read its units ({which}); name it with next_layer", layer=layer
        )
    return readers[0]


def check_pair(model: nn.Module, layer: str, host: nn.Module, reader: nn.Module) -> int:
    """The number of units between the two layers.

    Raises:
        GraftError: the two do not fit together, or a weight is tied.
    """
    for module in (host, reader):
        weight = module._parameters.get("weight")
        kind = kind_of(module)
        known = kind in layout.LINEAR | layout.TRANSPOSED_LINEAR | layout.CONVOLUTION
        if not known or weight is None or getattr(module, "groups", 1) != 1:
            raise GraftError(f"the axes of a {kind}'s weight are unknown", layer=layer)
        if is_tied(model, module):
            raise GraftError("a weight of the two layers is tied to another layer", layer=layer)
    given = weight_of(host).shape[_output_axis(host)]
    if given != weight_of(reader).shape[_input_axis(reader)]:
        raise GraftError("the two layers have different numbers of channels", layer=layer)
    return int(given)


def silence(reader: nn.Module, units: list[int], around: Surroundings) -> None:
    """Sets the outgoing weights of units to zero, and clears their moments."""
    _write(weight_of(reader), units, _input_axis(reader), around, None)


def renew(host: nn.Module, units: list[int], around: Surroundings, *, seed: int) -> None:
    """Gives units new incoming weights as torch initialises them; clears bias and moments."""
    _write(weight_of(host), units, _output_axis(host), around, seed)
    bias = host._parameters.get("bias")
    if bias is not None:
        _write(bias, units, 0, around, None)


def weight_of(module: nn.Module) -> nn.Parameter:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def answer(model: nn.Module, sample: Batch) -> Tensor:
    """The model's first output tensor in eval mode; the model is not changed."""
    with torch.no_grad(), put_back(model, False):
        output = sample.run(model)
    found = _first_tensor(output)
    if found is None:
        raise GraftError("the model returned no tensor", layer="")
    return found.clone()


@contextmanager
def watched(model: nn.Module, name: str, look: Any) -> Iterator[None]:
    end = watch(model, name, look)
    try:
        yield
    finally:
        end()


def _output_axis(module: nn.Module) -> int:
    return 1 if kind_of(module) in layout.TRANSPOSED_LINEAR else 0


def _input_axis(module: nn.Module) -> int:
    return 1 - _output_axis(module)


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    tensors = (item for item in values if isinstance(item, Tensor) and item.dim())
    return next(tensors, None)


def _write(
    parameter: nn.Parameter, units: list[int], axis: int, around: Surroundings, seed: int | None
) -> None:
    """Zeros, or values drawn with a seed; the moments of the same places become zero."""
    index = torch.tensor(units, device=parameter.device)
    part = torch.zeros_like(parameter.index_select(axis, index))
    if seed is not None:
        generator = torch.Generator("cpu").manual_seed(seed)
        bound = 1.0 / math.sqrt(max(1, parameter.numel() // parameter.shape[axis]))
        drawn = torch.rand(part.shape, generator=generator, dtype=torch.float32, device="cpu")
        part = (drawn * 2 - 1).to(part) * bound
    parameter.index_copy_(axis, index, part)
    for optimizer in with_companions(around.optimizers):
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.index_fill_(axis, index.to(value.device), 0.0)
