"""Which blueprints fit a layer, at which cost, and why not each of the others."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, overload

from torch import nn

from esper.blueprints.base import Blueprint
from esper.blueprints.registry import list_blueprints
from esper.console import printable
from esper.contracts import CostForecast, LayerInfo
from esper.exceptions import UnknownLayerError
from esper.near_names import or_known
from esper.tables import aligned, cut, html_table

COLUMNS = ("blueprint", "smallest size", "parameters", "MiB", "why not")
_LONGEST_SIZE, _LONGEST_REASON = 32, 100


@dataclass(frozen=True, slots=True)
class Fit:
    """One blueprint at one layer.

    Attributes:
        blueprint: slug.
        reason: why it does not fit; empty where it does.
        config: its smallest size; empty where it does not fit, or has only one.
        cost: forecast at this size, None where it does not fit.
    """

    blueprint: str
    reason: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    cost: CostForecast | None = None

    @property
    def fits(self) -> bool:
        return self.cost is not None

    def __str__(self) -> str:
        if self.cost is None:
            return f"{self.blueprint}: {self.reason}"
        return f"{self.blueprint}: fits, from {self.cost.parameters:,} parameters on"

    def row(self) -> tuple[str, ...]:
        """A cell for each of :data:`COLUMNS`."""
        if self.cost is None:
            return self.blueprint, "-", "-", "-", cut(self.reason, _LONGEST_REASON)
        size = ", ".join(f"{name}={value}" for name, value in self.config.items())
        parameters, memory = f"{self.cost.parameters:,}", f"{self.cost.memory_mib:.3g}"
        return self.blueprint, cut(size or "-", _LONGEST_SIZE), parameters, memory, ""


class Fits(Sequence[Fit]):
    """Every blueprint at one layer: those that fit first, the smallest first; prints as a table."""

    def __init__(self, layer: LayerInfo, entries: Iterable[Fit]) -> None:
        self.layer = layer
        self._entries = tuple(sorted(entries, key=_order))

    @overload
    def __getitem__(self, index: int) -> Fit: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Fit]: ...
    def __getitem__(self, index: int | slice) -> Fit | Sequence[Fit]:
        return self._entries[index]

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def fitting(self) -> tuple[str, ...]:
        """Slugs of those that fit."""
        return tuple(entry.blueprint for entry in self if entry.fits)

    def title(self) -> str:
        return f"{len(self.fitting)} of {len(self)} blueprints fit {self.layer}"

    def __str__(self) -> str:
        table = aligned([COLUMNS, *(entry.row() for entry in self)], right=(2, 3))
        return printable("\n".join([self.title(), *table]))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        table = html_table(COLUMNS, (entry.row() for entry in self))
        return f"<p><b>{html.escape(self.title())}</b></p>{table}"


def for_layer(where: Any, layer: str, *, sample: Any = None) -> Fits:
    """Which blueprints can be grafted into a layer, and why not each of the others.

    Args:
        where: a session, or a model.
        layer: name of the layer.
        sample: of a model without a session: an input, as for :func:`esper.graft`.

    Raises:
        UnknownLayerError: there is no such layer.
    """
    if isinstance(where, nn.Module):
        # Above this package, and needed only here: whoever asks about a model means its layers.
        info, present = import_module("esper.grafting").describe_layer(where, layer, sample)
    else:
        info, present = _of_session(where, layer)
    return fits_of(info, present)


def fits_of(layer: LayerInfo, present: Iterable[str] = ()) -> Fits:
    """As :func:`for_layer`, of a layer's description.

    Args:
        present: slugs of the grafts that the layer has.
    """
    grafts = {entry.slug: entry for entry in list_blueprints() if entry.slug in set(present)}
    return Fits(layer, [_fit(entry, layer, grafts) for entry in list_blueprints()])


def _of_session(session: Any, layer: str) -> tuple[LayerInfo, list[str]]:
    known = {info.name: info for info in session.layers}
    if layer not in known:
        raise UnknownLayerError(
            f"the model has no layer {layer!r}{or_known(layer, known)}", layer=layer
        )
    grafted = [entry for entry in session.adaptations if entry.grafted and not entry.merged]
    return known[layer], [entry.blueprint for entry in grafted if entry.layer == layer]


def _fit(blueprint: Blueprint, layer: LayerInfo, grafts: dict[str, Blueprint]) -> Fit:
    if not layer.graftable:
        return Fit(blueprint.slug, layer.reason or "the layer may not be grafted")
    reason = _conflict(blueprint, grafts) or blueprint.refusal(layer)
    sizes = () if reason else blueprint.sizes(layer)
    if not sizes:
        return Fit(blueprint.slug, reason or "it has no valid size for this layer")
    config = sizes[0]
    return Fit(blueprint.slug, "", config, blueprint.forecast(layer, config))


def _conflict(blueprint: Blueprint, grafts: dict[str, Blueprint]) -> str:
    if blueprint.slug in grafts:
        return "the layer has it already"
    for slug, other in grafts.items():
        if slug in blueprint.conflicts or blueprint.slug in other.conflicts:
            return f"it conflicts with {slug}, which the layer has"
    if blueprint.requires and blueprint.requires.isdisjoint(grafts):
        return f"it needs {' or '.join(sorted(blueprint.requires))} on the layer first"
    return ""


def _order(entry: Fit) -> tuple[bool, int, str]:
    return (not entry.fits, entry.cost.parameters if entry.cost else 0, entry.blueprint)
