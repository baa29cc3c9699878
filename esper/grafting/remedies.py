"""Remedies other than grafts: small changes of a live model, each with a receipt to undo it.

    check → snapshot → change → verify
An exception at any point leaves model, optimizer and random streams as they were.

Shape legend: N rows, C channels.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import Graft, get_blueprint, layout
from esper.exceptions import GraftError
from esper.grafting import ledger
from esper.grafting.certify import put_back, sample_input
from esper.grafting.companion import accompany, dismiss, with_companions
from esper.grafting.digests import Frozen, hash_in_background
from esper.grafting.graph import kind_of
from esper.grafting.optimizers import optimizer_of, parameters_of
from esper.grafting.receipts import Receipt, RemedyReceipt
from esper.grafting.slot import find_host, remove_slots, slot_of, slots, watch
from esper.grafting.snapshot import Snapshot, own_change
from esper.grafting.surroundings import BARE, Surroundings

DEAD_BELOW = 0.025  # of the layer's mean |h| (ReDo, Sokar et al. 2023, arXiv 2302.12902)
_MERGED_SHARE = 64  # allowed difference of a merge, in rounding errors of the output's scale


def recycle_dead_units(
    model: nn.Module,
    layer: str,
    next_layer: str,
    sample: Any,
    *,
    surroundings: Surroundings = BARE,
    seed: int = 0,
    step: int = -1,
) -> RemedyReceipt:
    """Resets units that never fire: new incoming weights, zero outgoing weights, no moments.

    A unit is dead where its mean activation, at the input of ``next_layer``, is at most 2.5 % of
    the layer's mean. The model's output changes only by what the dead units still contributed.

    Args:
        next_layer: the only layer that reads the units, apart from a nonlinearity.
        sample: model input; a run without gradients shows which units are dead, and that nothing
            else reads them.

    Raises:
        UnknownLayerError: the model has no such layer.
        GraftError: the two layers do not fit together, a weight is tied, no unit is dead, or
            another layer reads the units. Nothing was changed.
    """
    host, reader = find_host(model, layer), find_host(model, next_layer)
    width = _check_pair(model, layer, host, reader)

    def change() -> dict[str, Any]:
        dead = _dead_units(model, next_layer, reader, width, sample)
        if not dead:
            raise GraftError("the layer has no dead unit", layer=layer)
        before = _answer(model, sample)
        _clear(reader, dead, _input_axis(reader), surroundings, fill=None)
        without = _answer(model, sample)
        _clear(host, dead, _output_axis(host), surroundings, fill=seed)
        if not torch.equal(_answer(model, sample), without):
            raise GraftError(f"another layer than {next_layer!r} reads its units", layer=layer)
        lost = float((without - before).abs().max())
        return {"units": dead, "next_layer": next_layer, "seed": seed, "max_abs_diff": lost}

    return apply_change(model, "recycle", layer, change, surroundings, step)


def freeze(
    model: nn.Module, layer: str, *, surroundings: Surroundings, step: int = -1
) -> RemedyReceipt:
    """Freezes a layer. The optimizer still holds it, with its state, and skips it.

    Raises:
        UnknownLayerError, GraftError: nothing was changed.
    """
    own = [p for p in find_host(model, layer).parameters(recurse=False) if p.requires_grad]
    if not own:
        raise GraftError("the layer is frozen already", layer=layer)

    def change() -> dict[str, Any]:
        ledger.freeze(own)
        return {"parameters": sum(p.numel() for p in own)}

    return apply_change(model, "freeze", layer, change, surroundings, step)


def unfreeze(
    model: nn.Module, layer: str, *, surroundings: Surroundings, step: int = -1
) -> RemedyReceipt:
    """Trains a frozen layer again: by the optimizer that holds it, else by a companion.

    Raises:
        UnknownLayerError, GraftError: nothing was changed.
    """
    host = find_host(model, layer)
    own = [p for p in host.parameters(recurse=False) if not p.requires_grad]
    if not own or not surroundings.optimizers:
        reason = (
            "no parameter of the layer is frozen"
            if not own
            else "there is no optimizer to train it"
        )
        raise GraftError(reason, layer=layer)

    def change() -> dict[str, Any]:
        for parameter in own:
            parameter.requires_grad_(True)
        held = {id(p) for o in with_companions(surroundings.optimizers) for p in parameters_of(o)}
        unheld = [parameter for parameter in own if id(parameter) not in held]
        if unheld:
            optimizer = optimizer_of(surroundings.optimizers, host)
            accompany(optimizer, unheld, layer=layer, scaler=surroundings.scaler)
        return {"parameters": sum(p.numel() for p in own)}

    return apply_change(model, "unfreeze", layer, change, surroundings, step)


def merge(
    model: nn.Module, receipt: Receipt, *, surroundings: Surroundings, step: int = -1
) -> RemedyReceipt:
    """Folds a graft into its host's own weights; ``details["max_abs_diff"]`` is measured.

    Raises:
        GraftError: it cannot be merged, an older graft runs before it, the weight is tied, or
            the merged layer differs by more than rounding. Nothing was changed.
    """
    layer, graft = receipt.layer, receipt.graft
    host = find_host(model, layer)
    slot = slot_of(host)
    if slot is None or not receipt.present:
        raise GraftError("this graft is not in the model any more", layer=layer)
    _refuse_merge(model, host, receipt, next(iter(slot.grafts())))

    def change() -> dict[str, Any]:
        x = sample_input(receipt.record.layer)
        with torch.no_grad(), put_back(host, False):
            expected = graft(x, host.forward(x))
            _merge_into(graft, host, layer)
            found = host.forward(x)
        lost = float((found - expected).abs().max())
        allowed = _MERGED_SHARE * torch.finfo(expected.dtype).eps * float(expected.abs().max())
        if not lost <= allowed:
            raise GraftError(
                f"the merged layer differs by {lost:.3g}; the limit is {allowed:.3g}", layer=layer
            )
        slot.take_out(receipt.blueprint)
        dismiss(graft.parameters(), surroundings.optimizers)
        return {"blueprint": receipt.blueprint, "max_abs_diff": lost, "limit": allowed}

    done = apply_change(model, "merge", layer, change, surroundings, step)
    graft.merged, done._merged = True, graft
    return done


def is_tied(model: nn.Module, host: nn.Module) -> bool:
    """Another layer uses one of the layer's own tensors, so a change would affect it too."""
    own = {id(p) for p in host.parameters(recurse=False)}
    holders = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return any(holders[key] > 1 for key in own)


def apply_change(
    model: nn.Module,
    remedy: str,
    layer: str,
    change: Callable[[], dict[str, Any]],
    surroundings: Surroundings,
    step: int,
) -> RemedyReceipt:
    """Changes a model under a snapshot; where ``change`` raises, everything is as before.

    Args:
        remedy: its name, for the receipt.
        change: does it, and returns JSON values that tell what was done.
    """
    started = time.perf_counter()
    slotted = {name for name, _, _ in slots(model)}
    snapshot = Snapshot.take(model, replace(surroundings, copies=()))
    try:
        with own_change(model):
            snapshot.follow()
            before = snapshot.freeze(model)
            with torch.no_grad():
                details = change()
        # Unlike a graft, a remedy changes tensors that the snapshot has copies of.
        after = Frozen.of(model)
        hash_in_background(after)
        return RemedyReceipt(
            remedy=remedy,
            layer=layer,
            step=step,
            details=details,
            pause_ms=(time.perf_counter() - started) * 1e3,
            _before=before,
            _after=after,
            _model=model,
            _surroundings=replace(surroundings, copies=()),
            _snapshot=snapshot,
        )
    except BaseException:
        snapshot.restore()
        raise
    finally:
        remove_slots(model, {name for name, _, _ in slots(model)} - slotted)


# -- dead units --------------------------------------------------------------------------------


def _check_pair(model: nn.Module, layer: str, host: nn.Module, reader: nn.Module) -> int:
    """The number of units between the two layers."""
    for module in (host, reader):
        weight = module._parameters.get("weight")
        kind = kind_of(module)
        known = kind in layout.LINEAR | layout.TRANSPOSED_LINEAR | layout.CONVOLUTION
        if not known or weight is None or getattr(module, "groups", 1) != 1:
            raise GraftError(f"the axes of a {kind}'s weight are unknown", layer=layer)
        if is_tied(model, module):
            raise GraftError("a weight of the two layers is tied to another layer", layer=layer)
    given = _weight(host).shape[_output_axis(host)]
    if given != _weight(reader).shape[_input_axis(reader)]:
        raise GraftError("the two layers have different numbers of channels", layer=layer)
    return int(given)


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def _output_axis(module: nn.Module) -> int:
    return 1 if kind_of(module) in layout.TRANSPOSED_LINEAR else 0


def _input_axis(module: nn.Module) -> int:
    return 1 - _output_axis(module)


def _dead_units(
    model: nn.Module, name: str, reader: nn.Module, width: int, sample: Any
) -> list[int]:
    seen: list[Tensor] = []
    axis = layout.channel_axis_of(kind_of(reader))

    def look(x: Tensor, y: Tensor) -> None:
        seen.append(x.detach().float().movedim(axis, -1).reshape(-1, width).abs().mean(0))

    with _watched(model, name, look):
        _answer(model, sample)
    if not seen:
        raise GraftError("the next layer did not run with this sample", layer=name)
    strength_C = torch.stack(seen).mean(0)
    return (strength_C <= DEAD_BELOW * strength_C.mean()).nonzero().flatten().tolist()


@contextmanager
def _watched(model: nn.Module, name: str, look: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    end = watch(model, name, look)
    try:
        yield
    finally:
        end()


def _answer(model: nn.Module, sample: Any) -> Tensor:
    """The model's first output tensor in eval mode; the model is not changed."""
    with torch.no_grad(), put_back(model, False):
        if isinstance(sample, dict):
            output = model(**sample)
        else:
            output = model(*sample) if isinstance(sample, tuple | list) else model(sample)
    found = _first_tensor(output)
    if found is None:
        raise GraftError("the model returned no tensor", layer="")
    return found.clone()


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    tensors = (item for item in values if isinstance(item, Tensor) and item.dim())
    return next(tensors, None)


def _clear(
    module: nn.Module, units: list[int], axis: int, around: Surroundings, *, fill: int | None
) -> None:
    """Sets units along one axis to zero, or to values from the seed ``fill``; clears moments."""
    weight, bias = _weight(module), module._parameters.get("bias")
    index = torch.tensor(units, device=weight.device)
    part = torch.zeros_like(weight.index_select(axis, index))
    if fill is not None:
        generator = torch.Generator().manual_seed(fill)
        bound = 1.0 / math.sqrt(max(1, weight.numel() // weight.shape[axis]))
        part = (torch.rand(part.shape, generator=generator) * 2 - 1).to(part) * bound
    weight.index_copy_(axis, index, part)
    _forget_moments(weight, index, axis, around)
    if fill is not None and bias is not None:
        bias.index_fill_(0, index, 0.0)
        _forget_moments(bias, index, 0, around)


def _forget_moments(
    parameter: nn.Parameter, index: Tensor, axis: int, around: Surroundings
) -> None:
    for optimizer in with_companions(around.optimizers):
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.index_fill_(axis, index.to(value.device), 0.0)


# -- parameter groups and merging --------------------------------------------------------------


def _refuse_merge(model: nn.Module, host: nn.Module, receipt: Receipt, oldest: str) -> None:
    reason = ""
    if not get_blueprint(receipt.blueprint).mergeable:
        reason = f"{receipt.blueprint} cannot be merged into a layer's weights"
    elif oldest != receipt.blueprint:
        reason = f"{oldest} is older and runs before it; merge or remove that first"
    elif is_tied(model, host):
        reason = "its weight is tied to another layer, which would change too"
    if reason:
        raise GraftError(reason, layer=receipt.layer)


def _merge_into(graft: Graft, host: nn.Module, layer: str) -> None:
    try:
        graft.merge(host)
    except TypeError as error:
        raise GraftError(str(error), layer=layer) from error
