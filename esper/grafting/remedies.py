"""Remedies other than grafts: small changes of a live model, each with a receipt to undo it.

    check → snapshot → change → verify
An exception at any point leaves model, optimizer and random streams as they were.

Shape legend: N rows, C channels.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from esper.blueprints import Graft, get_blueprint
from esper.exceptions import GraftError
from esper.grafting.changes.certify import put_back, sample_input
from esper.grafting.companions.companion import dismiss
from esper.grafting.pauses import without_collection
from esper.grafting.receipts import Receipt, RemedyReceipt
from esper.grafting.slot import find_host, remove_slots, slot_of, slots
from esper.grafting.snapshots.snapshot import Snapshot, own_change
from esper.grafting.surroundings import Surroundings
from esper.grafting.tensors.digests import Frozen, hash_in_background
from esper.grafting.trained_tensors import ledger

_MERGED_SHARE = 64  # allowed difference of a merge, in rounding errors of the output's scale


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
    shared = shared_tensors(model)
    return any(id(p) in shared for p in host.parameters(recurse=False))


def shared_tensors(model: nn.Module) -> set[int]:
    """Ids of the parameters that several layers use."""
    holders = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return {key for key, count in holders.items() if count > 1}


@without_collection()
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


# -- merging -----------------------------------------------------------------------------------


def _refuse_merge(model: nn.Module, host: nn.Module, receipt: Receipt, oldest: str) -> None:
    reason = ""
    if not get_blueprint(receipt.blueprint).mergeable:
        reason = f"{receipt.blueprint} cannot be merged into a layer's weights"
    elif oldest != receipt.blueprint:
        reason = f"{oldest} is older and runs before it; merge or remove that first"
    elif receipt.record.layer.since:
        reason = (
            "it would change the shapes of two layers, which the optimizer holds; "
            "esper.export(model) merges it in a copy"
        )
    elif is_tied(model, host):
        reason = "its weight is tied to another layer, which would change too"
    if reason:
        raise GraftError(reason, layer=receipt.layer)


def _merge_into(graft: Graft, host: nn.Module, layer: str) -> None:
    try:
        graft.merge(host)
    except TypeError as error:
        raise GraftError(str(error), layer=layer) from error
