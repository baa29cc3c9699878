"""Element-wise activation functions, by the name under which a layer's description has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its approximation with tanh."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
}


# Class of the node in the graph of the gradient -> name, and the settings that the node must have.
_NODES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "ReluBackward0": ("relu", {}),
    "SiluBackward0": ("silu", {}),
    "TanhBackward0": ("tanh", {}),
    "SigmoidBackward0": ("sigmoid", {}),
    "EluBackward0": ("elu", {"_saved_alpha": 1.0, "_saved_scale": 1.0}),
    "LeakyReluBackward0": ("leaky_relu", {"_saved_negative_slope": 0.01}),
}
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def node_number(node: Node | None) -> int | None:
    """What tells a node of the graph of the gradient from others, without keeping it alive."""
    number = getattr(node, "_sequence_nr", None)
    return None if number is None else number()


def activation_between(before: int, after: Node) -> str:
    """The name of the activation function that is all there is between two tensors.

    Args:
        before: number of the first one's node in the graph of the gradient.
        after: node of the second one.

    Returns:
        Empty where it is another function, or more than one.
    """
    (source, _), *_ = after.next_functions or ((None, 0),)
    if node_number(source) != before:
        return ""
    if after.name() == "GeluBackward0":
        return _GELU.get(getattr(after, "_saved_approximate", ""), "")
    name, settings = _NODES.get(after.name(), ("", {}))
    same = all(getattr(after, key, None) == value for key, value in settings.items())
    return name if same else ""
