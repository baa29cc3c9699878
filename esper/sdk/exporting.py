"""A finished model without Esper's hooks: a plain module that any script can save and load."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from esper import blueprints
from esper.blueprints import Graft
from esper.blueprints.base import introduce
from esper.contracts import GraftKind
from esper.grafting import remove_slots
from esper.grafting.slot import first_tensor, replace_first_tensor, slots

_TRAINING_ONLY = frozenset({GraftKind.WRAP, GraftKind.OBSERVE})


class GraftedLayer(nn.Module):
    """A layer and the grafts beside it, as one ordinary module."""

    def __init__(self, host: nn.Module, grafts: list[Graft]) -> None:
        super().__init__()
        self.host = host
        self.grafts = nn.ModuleList(grafts)
        introduce(grafts)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives, after its grafts."""
        output = self.host(*args, **kwargs)
        x, y = first_tensor((*args, *kwargs.values())), first_tensor(output)
        if x is None or y is None:
            return output
        return replace_first_tensor(output, self._combine(x, y))

    def _combine(self, x: Tensor, y: Tensor) -> Tensor:
        for graft in self.grafts:
            y = graft(x, y)
        return y


def export(model: nn.Module) -> nn.Module:
    """A copy of the model that computes the same and has no slot and no hook of Esper's in it.

    What can be merged is merged into the layer's own weights; what only watches or clamps
    gradients is left out; any other graft becomes part of a :class:`GraftedLayer` in the layer's
    place. The model itself is untouched.
    """
    copied = copy.deepcopy(getattr(model, "_orig_mod", model))
    for name, host, slot in [*slots(copied)]:
        rest: list[Graft] = []
        for slug in list(slot.grafts()):
            blueprint, graft = blueprints.get(slug), slot.take_out(slug)
            if blueprint.kind in _TRAINING_ONLY:
                continue
            if rest or not _merged(blueprint.mergeable, graft, host):
                rest.append(graft)  # after one that stays, order forbids to merge
        remove_slots(copied, [name])
        if rest:
            copied = _replace(copied, name, GraftedLayer(host, rest))
    return copied


def _merged(mergeable: bool, graft: Graft, host: nn.Module) -> bool:
    if not mergeable:
        return False
    try:
        graft.merge(host)
    except TypeError:
        return False
    return True


def _replace(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    if not name:
        return layer
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    return model
