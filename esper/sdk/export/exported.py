"""What an exported model consists of, besides the script's own classes.

This file and the grafts' own classes are copied, by :mod:`esper.sdk.export.plain_source`, into the
``grafted.py`` that an export writes. So it imports torch alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esper.grafting.slot import first_tensor, replace_first_tensor

MANIFEST_FILE = "grafted.json"
WEIGHTS_FILE = "weights.pt"


class GraftedLayer(nn.Module):
    """A layer and the grafts beside it, as one ordinary module.

    torch prints the names of tensors that a plain model does not have, so the name of the grafts
    says how they are loaded.

    Args:
        reason: why the grafts are not merged into the layer.
    """

    def __init__(self, host: nn.Module, grafts: list[Any], reason: str = "") -> None:
        super().__init__()
        self.host = host
        self.load_with_grafted_load = nn.ModuleList(grafts)
        self.reason = reason
        for graft in grafts:
            graft.join(grafts)  # a router looks for its experts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, after its grafts."""
        output = self.host(*args, **kwargs)
        x, y = first_tensor((*args, *kwargs.values())), first_tensor(output)
        if x is None or y is None:
            return output
        return replace_first_tensor(output, self._combine(x, y))

    def _combine(self, x: Tensor, y: Tensor) -> Tensor:
        for graft in self.load_with_grafted_load:
            y = graft(x, y)
        return y

    def extra_repr(self) -> str:
        """Why this is not a plain layer."""
        return self.reason

    def __getattr__(self, name: str) -> Any:
        # A model may read its layer's weight or its width, as attention reads its projection's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("host"), name)


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Makes a fresh model the exported one: its grafts as ordinary modules, and all weights.

    Args:
        model: of the script's own class, as it is built without Esper.
        folder: that :func:`esper.export` wrote.

    Returns:
        The model, on the device that it was on; another object only where the whole model is the
        grafted layer.
    """
    manifest = json.loads((Path(folder) / MANIFEST_FILE).read_text())
    for name, grafts in manifest["layers"].items():
        host, reason = model.get_submodule(name), manifest.get("unmerged", {}).get(name)
        device = next((tensor.device for tensor in host.parameters()), None)
        layer = GraftedLayer(host, [build(graft).to(device) for graft in grafts], reason or "")
        model = put_in_place(model, name, layer)
    weights = torch.load(Path(folder) / WEIGHTS_FILE, map_location="cpu", weights_only=True)
    for name in manifest.get("widened", []):
        linear = model.get_submodule(name)
        give_weights(linear, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
    model.load_state_dict(weights)
    return model


def give_weights(linear: Any, weight_OI: Tensor, bias_O: Tensor | None) -> None:
    """Makes a linear layer as wide as its new weights; they are trained as the old ones were."""
    trained = linear.weight.requires_grad
    device = linear.weight.device
    linear.register_parameter("weight", nn.Parameter(weight_OI.to(device), trained))
    bias = None if bias_O is None else nn.Parameter(bias_O.to(device), trained)
    linear.register_parameter("bias", bias)
    linear.out_features, linear.in_features = weight_OI.shape


def put_in_place(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """The model with ``layer`` where its module of that name was."""
    if not name:
        return layer
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    return model


def build(described: dict[str, Any]) -> nn.Module:
    """A module from its description; its tensors are still to be loaded."""
    kind = class_named(described["class"])
    module: nn.Module = kind.__new__(kind)
    nn.Module.__init__(module)
    vars(module).update({key: _value(value) for key, value in described["attributes"].items()})
    for name, tensor in described["parameters"].items():
        parameter = None if tensor is None else nn.Parameter(_empty(tensor), tensor["trained"])
        module.register_parameter(name, parameter)
    for name, tensor in described["buffers"].items():
        module.register_buffer(name, None if tensor is None else _empty(tensor))
    for name, child in described["children"].items():
        module.add_module(name, build(child))
    return module


def class_named(name: str) -> type[nn.Module]:
    """A graft's class out of this file, or one of torch's own layers."""
    found = globals().get(name) if "." not in name else getattr(nn, name.removeprefix("nn."), None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{name!r} is no layer that an export could hold")
    return found


def _empty(tensor: dict[str, Any]) -> Tensor:
    return torch.empty(tensor["shape"], dtype=getattr(torch, tensor["dtype"]), device="cpu")


def _value(value: Any) -> Any:
    """JSON knows no tuples and names keys by texts alone, so both are written as lists."""
    if isinstance(value, dict) and "tuple" in value:
        return tuple(map(_value, value["tuple"]))
    if isinstance(value, dict):
        return dict(_value(value["dict"]))
    return [_value(item) for item in value] if isinstance(value, list) else value
