"""Merges a graft that spans two linear layers: its units become units of the hidden layer.

Exact where only an activation is between the two layers, the graft has the same one, and nothing
else reads the hidden layer. ``torch.fx`` shows that, in a copy, because it runs the user's code.

Shape legend: I inputs, H hidden units of the host, G of the graft, O outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from esper.blueprints import Graft
from esper.blueprints.catalog.widen_hidden import WideBranch
from esper.blueprints.feedforward import GeluBranch
from esper.fail_closed import is_the_scripts, short
from esper.grafting.remedies import is_tied
from esper.grafting.spans import scope_of
from esper.sdk.export.exported import give_weights

# What passes units through one by one, and is no activation in eval mode.
_NEUTRAL = (nn.Dropout, nn.Identity)
_MODULES: Mapping[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}
_FUNCTIONS: Mapping[Callable[..., Any], str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.silu: "silu",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
}
_METHODS = frozenset({"relu", "relu_", "tanh", "sigmoid"})


def widen(model: nn.Module, since: str, layer: str, graft: Graft) -> str:
    """Merges ``graft`` into the two layers; says why not, where it cannot, and changes nothing."""
    first, last = model.get_submodule(since), model.get_submodule(layer)
    for name, module in ((since, first), (layer, last)):
        if type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}, not a plain Linear"
        if is_tied(model, module):
            return f"another layer shares the weights of {name}"
    if not isinstance(graft, WideBranch | GeluBranch):
        return "it is no branch with one hidden layer and one activation"
    found, reason = _activation_between(model, since, layer)
    if reason:
        return reason
    if found != graft.activation:
        between = found or "no activation"
        return f"between the two layers is {between}, and the graft has {graft.activation}"
    _merge(first, last, graft)
    return ""


def _merge(first: Any, last: Any, graft: WideBranch | GeluBranch) -> None:
    bias_H = torch.zeros_like(first.weight[:, 0]) if first.bias is None else first.bias
    weight_HI = torch.cat([first.weight, graft.weight_in.to(first.weight)])
    weight_OH = torch.cat([last.weight, graft.weight_out.to(last.weight)], 1)
    give_weights(first, weight_HI.detach(), torch.cat([bias_H, graft.bias_in.to(bias_H)]).detach())
    give_weights(last, weight_OH.detach(), None if last.bias is None else last.bias.detach())


def _activation_between(model: nn.Module, since: str, layer: str) -> tuple[str, str]:
    """(the activation between two layers, why that is not known); one of them is empty."""
    scope = scope_of(model, since, layer)
    inside = f"{scope}." if scope else ""
    start, end = since.removeprefix(inside), layer.removeprefix(inside)
    try:
        traced = fx.symbolic_trace(copy.deepcopy(model.get_submodule(scope)))
    except Exception as error:  # it runs the user's code
        if is_the_scripts(error):
            raise
        return "", f"torch.fx cannot follow the model from {since} to {layer} ({short(error)})"
    node: fx.Node | None = next((n for n in traced.graph.nodes if n.target == start), None)
    found = ""
    while node is not None:
        if len(node.users) != 1:
            return "", f"the units between {since} and {layer} are read elsewhere too"
        node = next(iter(node.users))
        if node.op == "call_module" and node.target == end:
            return found, ""
        name = _activation(traced, node)
        if name is None or (name and found):
            return "", f"between {since} and {layer} is {node.target}, not an activation alone"
        found = found or name
    return "", f"torch.fx does not see {since}"


def _activation(traced: fx.GraphModule, node: fx.Node) -> str | None:
    """Its name; empty for what passes units through; None for anything else."""
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        if isinstance(module, _NEUTRAL):
            return ""
        if isinstance(module, nn.GELU):
            return _gelu(module.approximate)
        return _MODULES.get(type(module))
    if node.op == "call_method":
        return str(node.target).rstrip("_") if node.target in _METHODS else None
    if node.op != "call_function" or callable(node.target) is False:
        return None
    if node.target is F.gelu:
        return _gelu(str(node.kwargs.get("approximate", "none")))
    if node.target is F.dropout:
        return ""
    return _FUNCTIONS.get(node.target)  # type: ignore[arg-type]


def _gelu(approximate: str) -> str:
    return "gelu_tanh" if approximate == "tanh" else "gelu"
