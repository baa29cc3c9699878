"""Copies of a model that get its grafts too: the running averages of EMA and SWA.

``torch.optim.swa_utils.AveragedModel`` pairs the tensors of model and copy by their position. A
graft in only one of them would shift all later tensors: either the shapes differ and it raises, or
it averages different layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from esper.contracts import Finding, Severity
from esper.exceptions import ConfigurationError
from esper.grafting.compiled import without_compiler
from esper.grafting.slot import (
    find_host,
    prepare_slots,
    remove_slots,
    settle_spans,
    slot_of,
    slots,
)
from esper.grafting.state_dicts import follow_loads, follow_whole_states
from esper.grafting.tensors.forms import shape_of
from esper.grafting.trained_tensors.ledger import Problem, to_findings


def bare_copy(copied: Any) -> nn.Module:
    """The copied module, without the wrappers ``AveragedModel``, compile and DDP.

    Raises:
        ConfigurationError: it is not a module.
    """
    wrappers = (nn.parallel.DistributedDataParallel, _averaged_model())
    inner = copied
    while isinstance(inner, wrappers) or without_compiler(inner) is not inner:
        inner = inner.module if isinstance(inner, wrappers) else without_compiler(inner)
    if not isinstance(inner, nn.Module):
        raise ConfigurationError(f"a copy must be a module, got {type(copied).__name__}")
    return inner


def check_copy(model: nn.Module, copied: Any) -> None:
    """Raises ``ConfigurationError`` unless it has the model's tensors, by name and shape."""
    here = {name: shape_of(p) for name, p in model.named_parameters()}
    there = {name: shape_of(p) for name, p in bare_copy(copied).named_parameters()}
    if list(here.items()) != list(there.items()):
        differing = sorted(here.items() ^ there.items(), key=str)
        names = ", ".join(dict.fromkeys(name for name, _ in differing)) or "another order"
        raise ConfigurationError(f"a copy differs from the model: {names[:200]}")


def let_follow(model: nn.Module, copies: Iterable[Any], *, keep_slots: bool = False) -> None:
    """Makes the grafts of each copy those of the model, with their present weights.

    Args:
        keep_slots: leave idle slots where they are; a snapshot restores grafts, but no slots.
    """
    wanted = {layer: slot for layer, _, slot in slots(model)}
    for copied in map(bare_copy, copies):
        names = {name for name, _ in copied.named_modules()}
        if not wanted.keys() <= names:
            continue  # the script has rebuilt the model since, and nothing pairs with it any more
        for layer, _, slot in [*slots(copied)]:
            known = wanted[layer].grafts() if layer in wanted else {}
            for slug in [slug for slug in slot.grafts() if slug not in known]:
                slot.take_out(slug)
        settle_spans(copied)
        if not keep_slots:
            remove_slots(copied, [layer for layer, _, _ in slots(copied) if layer not in wanted])
        for layer, slot in wanted.items():
            _give(find_host(copied, layer), slot.grafts(), slot.records, copied, layer)
        settle_spans(copied)
        follow_whole_states(copied)


def audit_copies(model: nn.Module) -> list[Finding]:
    """Layers whose grafts differ between the model and a living copy of it.

    Copies made before the layer had a slot are unknown: before the model was attached, and in a
    run that only observes before its first graft.
    """
    return to_findings(
        Problem(
            f"{layer}.",
            Severity.CAUTION,
            "a copy of the model lacks this layer's grafts, or has other grafts; a running average "
            "pairs tensors by position and would mix different tensors",
            "pass it to attach as copies=, or call esper.grafting.let_follow(model, [copy])",
        )
        for layer, _, slot in slots(model)
        if any(mine.grafts().keys() != slot.grafts().keys() for mine in slot.copies)
    )


def _give(
    host: nn.Module,
    grafts: dict[str, Any],
    records: dict[str, Any],
    copied: nn.Module,
    layer: str,
) -> None:
    if not grafts:
        return
    prepare_slots(copied, [layer])
    mine = slot_of(host)
    assert mine is not None
    for slug, graft in grafts.items():
        if slug not in mine.grafts():
            mine.insert(records[slug], copy.deepcopy(graft))
            follow_loads(copied, host, slug)


def _averaged_model() -> type[nn.Module]:
    from torch.optim.swa_utils import AveragedModel  # importing it takes a second

    return AveragedModel
