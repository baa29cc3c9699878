"""A trained model without Esper: a plain module, and a folder that loads without Esper.

Grafts that cannot be merged become instances of classes whose source is copied from the blueprints
(see :mod:`esper.sdk.export.plain_source`). A pickle would name classes that only Esper has, and
``torch.export`` would fix the model to the shapes and the mode of one call.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from esper import blueprints
from esper.blueprints import Graft
from esper.contracts import GraftKind
from esper.exceptions import ConfigurationError
from esper.grafting import remove_slots
from esper.grafting.compiled import without_compiler
from esper.grafting.hooks import is_left_behind
from esper.grafting.manifest import GraftRecord
from esper.grafting.remedies import is_tied
from esper.grafting.slot import settle_spans, slots
from esper.sdk.export.exported import (
    MANIFEST_FILE,
    WEIGHTS_FILE,
    GraftedLayer,
    load,
    put_in_place,
)
from esper.sdk.export.model_card import CARD_FILE, origins_of, section
from esper.sdk.export.plain_source import source_of
from esper.sdk.export.widening import widen
from esper.sharding import kind_of

logger = logging.getLogger("esper")

SOURCE_FILE = "grafted.py"
_TRAINING_ONLY = frozenset({GraftKind.WRAP, GraftKind.OBSERVE})
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


def export(model: nn.Module, folder: str | Path | None = None) -> nn.Module:
    """A copy of the model that computes the same and has no slot and no hook of Esper's in it.

    What can be merged is merged into the layer's own weights: equal up to rounding, 1e-5 of the
    output's scale in float32. Where that is true of every graft, the copy has the names and the
    classes of the model before its grafts, so its ``state_dict()`` loads into the plain class. What
    only watches or clamps gradients is left out.

    A graft that spans two linear layers is merged into a wider hidden layer, where the activation
    between them is its own. Any other graft becomes part of a ``GraftedLayer`` in the layer's
    place, equal to the bit. One line in the log says which, why, and how to load them; so does
    ``print`` of the copy. A weight that is tied to another layer is left as it is. The model itself
    is untouched.

    Args:
        folder: also written there: ``grafted.py``, ``grafted.json`` and ``weights.pt``. With them,
            ``grafted.load(TheModel(...), folder)`` makes the same model where Esper is not
            installed. ``model_card.md`` says how the architecture came about, where it has grafts.

    Raises:
        ConfigurationError: a graft holds something that cannot be written as plain data, or spans
            layers and cannot be merged; or the model is spread over ranks.
    """
    if kind_of(model) is not None:
        raise ConfigurationError(
            "this rank holds a part of the model only. Gather the whole state on each rank, by "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options="
            "StateDictOptions(full_state_dict=True)); then, on rank 0: model = TheModel(...); "
            "esper.load_state_dict(model, state); esper.export(model)"
        )
    copied: nn.Module = copy.deepcopy(without_compiler(model))
    left: dict[str, list[Graft]] = {}
    reasons: dict[str, str] = {}
    records = _records_of(copied)
    spans = _spans_of(copied)
    for name, host, slot in [*slots(copied)]:
        alone = {s: graft for s, graft in slot.grafts().items() if s not in slot.carriers}
        rest, reason = _merge_what_can_be(copied, host, alone)
        for slug in list(slot.grafts()):
            slot.take_out(slug)
        settle_spans(copied)
        if rest:
            left[name], reasons[name] = rest, reason
    remove_slots(copied)
    widened = _widen(copied, spans, reasons)
    _drop_idle_hooks(copied)
    source = source_of(_classes(left))
    module = _module_of(source)
    described = {name: [_describe(graft) for graft in grafts] for name, grafts in left.items()}
    for name, grafts in left.items():
        plain = [_plain(module, graft) for graft in grafts]
        layer = module.GraftedLayer(copied.get_submodule(name), plain, reasons[name])
        layer.train(grafts[0].training)
        copied = put_in_place(copied, name, layer)
        logger.warning(
            "%s: %s. It was exported as a GraftedLayer, which a plain model does not have: export "
            "into a folder, and load with its grafted.load(TheModel(...), folder)",
            name,
            reasons[name],
        )
    if folder is not None:
        facts = {"layers": described, "unmerged": reasons, "widened": widened}
        card = section(origins_of(records, reasons, widened))
        _write(copied, Path(folder), source, facts, card)
    return copied


def _records_of(model: nn.Module) -> list[GraftRecord]:
    return [slot.records[slug] for _, _, slot in slots(model) for slug in slot.grafts()]


def _spans_of(model: nn.Module) -> list[tuple[str, str, str, Graft]]:
    """(earlier layer, later layer, slug, graft) of each graft that spans layers."""
    return [
        (slot.records[slug].layer.since, name, slug, slot.grafts()[slug])
        for name, _, slot in slots(model)
        for slug in slot.carriers
    ]


def _widen(
    model: nn.Module, spans: list[tuple[str, str, str, Graft]], unmerged: dict[str, str]
) -> list[str]:
    """Merges the grafts that span layers; returns the layers that have other shapes now."""
    widened: dict[str, None] = {}
    for since, layer, slug, graft in spans:
        beside = next((name for name in (since, layer) if name in unmerged), None)
        reason = f"a graft stays beside {beside}" if beside else widen(model, since, layer, graft)
        if reason:
            raise ConfigurationError(
                f"{slug} from {since} to {layer} cannot be merged, and a plain model has no place "
                f"for it: {reason}. Undo it before the export"
            )
        widened |= {since: None, layer: None}
        logger.warning(
            "%s and %s have more hidden units now than in the model's class: export into a "
            "folder, and load with its grafted.load(TheModel(...), folder)", since, layer,
        )  # fmt: skip
    return list(widened)


def _merge_what_can_be(
    model: nn.Module, host: nn.Module, grafts: dict[str, Graft]
) -> tuple[list[Graft], str]:
    """Merges from the oldest on.

    Returns:
        What has to stay beside the host, and why the first of it has to.
    """
    rest: list[Graft] = []
    reason = ""
    for slug, graft in grafts.items():
        if blueprints.get_blueprint(slug).kind in _TRAINING_ONLY:
            continue
        # Grafts act in order, so none is merged after one that stays.
        why_not = "" if rest else _merge(model, slug, graft, host)
        if rest or why_not:
            reason = reason or why_not
            rest.append(graft)
    return rest, reason


def _merge(model: nn.Module, slug: str, graft: Graft, host: nn.Module) -> str:
    """Merges a graft into its host; says why not, where it cannot."""
    kind = type(host).__name__
    if not blueprints.get_blueprint(slug).mergeable:
        return f"{slug} cannot be written as weights of this {kind}"
    if is_tied(model, host):
        return f"{slug} cannot be merged into weights that another layer shares"
    try:
        graft.merge(host)
    except TypeError:
        return f"{slug} cannot be merged into the weights of this {kind}"
    return ""


def _drop_idle_hooks(model: nn.Module) -> None:
    """The hooks that do nothing, which a copy has in the place of Esper's own."""
    kinds = [name for name in vars(model) if name.endswith("_hooks")]
    for module in model.modules():
        for hooks in (getattr(module, kind) for kind in kinds):
            for number in [number for number, hook in hooks.items() if is_left_behind(hook)]:
                del hooks[number]


def _classes(left: dict[str, list[Graft]]) -> list[Any]:
    """Esper's classes that an exported model consists of, in a fixed order."""
    kinds = {
        type(module)
        for grafts in left.values()
        for graft in grafts
        for module in graft.modules()
        if _is_ours(module)
    }
    return [GraftedLayer, load, *sorted(kinds, key=lambda kind: kind.__name__)]


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.split(".")[0] == "esper"


def _module_of(source: str) -> ModuleType:
    """The source as a module, so that the export here has the classes that it has elsewhere."""
    name = f"grafted_{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        module = ModuleType(name)
        exec(compile(source, f"<{name}>", "exec"), vars(module))  # noqa: S102 - our own source
        sys.modules[name] = module
    return sys.modules[name]


def _plain(module: ModuleType, grafted: nn.Module) -> nn.Module:
    """The same tensors and attributes, as an instance of the class that the export defines."""
    if _is_ours(grafted):
        kind = getattr(module, type(grafted).__name__)
        plain: nn.Module = kind.__new__(kind)
        vars(plain).update(vars(grafted))
    else:
        plain = grafted
    for name, child in grafted.named_children():
        plain._modules[name] = _plain(module, child)
    return plain


def _describe(module: nn.Module) -> dict[str, Any]:
    """What ``exported.build`` makes it from."""
    own = _is_ours(module)
    if not own and type(module).__module__.split(".")[0] != "torch":
        raise ConfigurationError(f"a {type(module).__name__} cannot be exported without its source")
    if module._non_persistent_buffers_set - {n for n, b in module._buffers.items() if b is None}:
        raise ConfigurationError(f"{type(module).__name__} holds a buffer that is not saved")
    held = {key: value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}
    return {
        "class": type(module).__name__ if own else f"nn.{type(module).__name__}",
        "attributes": {key: _json(key, value) for key, value in held.items()},
        "parameters": {name: _tensor(p) for name, p in module._parameters.items()},
        "buffers": {name: _tensor(buffer) for name, buffer in module._buffers.items()},
        "children": {name: _describe(child) for name, child in module.named_children()},
    }


def _tensor(tensor: Tensor | None) -> dict[str, Any] | None:
    if tensor is None:
        return None
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "trained": tensor.requires_grad,
    }


def _json(key: str, value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, tuple):
        # Modules in it are the neighbours in the slot; ``join`` finds them again when loaded.
        return {"tuple": [_json(key, v) for v in value if not isinstance(v, nn.Module)]}
    if isinstance(value, list):
        return [_json(key, item) for item in value]
    if type(value) is dict:
        pairs = [[name, item] for name, item in value.items()]
        return {"dict": _json(key, pairs)}
    raise ConfigurationError(f"{key} holds a {type(value).__name__}, which is not plain data")


def _write(
    model: nn.Module, folder: Path, source: str, manifest: dict[str, Any], card: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SOURCE_FILE).write_text(source)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))
    torch.save(model.state_dict(), folder / WEIGHTS_FILE)
    if card:
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
