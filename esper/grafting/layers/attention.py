"""What a model declares about its attention: cached tensors, causality, time axis.

Cached tensors are read from transformers' attention modules, which take a cache as
``past_key_values`` and use the same names for their projections in nearly all models. Other modules
declare nothing, and then nothing is assumed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_KEY_OR_VALUE = frozenset({"k_proj", "v_proj", "key", "value"})
_FUSED = "c_attn"  # GPT-2: queries, keys and values side by side, a third each
_HEAD_WIDTHS = ("head_dim", "attention_head_size")
_TELLS_TIME = (nn.MultiheadAttention, nn.RNNBase)
_BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def cached_part(model: nn.Module, name: str) -> dict[str, Any]:
    """``head_width`` and ``cached_channels`` of a layer, for its ``LayerInfo``.

    Returns:
        Empty if the layer computes no keys or values for a cache, or if this is unknown.
    """
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    width = next((w for a in _HEAD_WIDTHS if isinstance(w := getattr(parent, a, None), int)), 0)
    if not parent_name or not width or not _caches_its_own(parent):
        return {}
    weight = getattr(model.get_submodule(name), "weight", None)
    if weight is None or weight.dim() != 2:
        return {}
    channels = int(weight.shape[1 if child == _FUSED else 0])
    if child == _FUSED and channels == 3 * weight.shape[0] and not channels // 3 % width:
        return {"head_width": width, "cached_channels": (channels // 3, channels)}
    if child in _KEY_OR_VALUE and not channels % width:
        return {"head_width": width, "cached_channels": (0, channels)}
    return {}


def looks_ahead(model: nn.Module) -> bool:
    """True if every attention in the model declares that it is not causal.

    Otherwise False, also for attention that declares nothing and for a model that can generate: a
    branch that sees future tokens lowers a language model's loss without learning.
    """
    generates = getattr(model, "can_generate", None)
    if callable(generates) and generates():
        return False
    found = list(_declared_causality(model))
    return bool(found) and not any(found)


class TimeAxis:
    """The time axis in the inputs of a model's layers.

    Torch's attention and recurrent modules declare whether they take the batch first. A layer with
    the same two leading sizes has the same axes; a layer inside a torch block has the block's.

    Args:
        shapes: input shapes of the traced layers, by name.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._modules = dict(model.named_modules())
        self._axes: dict[tuple[int, ...], set[int]] = {}  # two leading sizes -> time axes
        self._time_first = False
        for name, module in self._modules.items():
            if isinstance(module, _TELLS_TIME):
                self._time_first |= not module.batch_first
                self._learn(shapes.get(name, ()), int(module.batch_first))

    def of(self, name: str, shape: tuple[int, ...]) -> int:
        """0 or 1; -1 if the model has both orders and this layer's order is unknown."""
        if len(shape) != 3 or not self._time_first:
            return 1
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            around = self._modules[".".join(parts[:end])]
            if isinstance(around, _BLOCKS):
                return int(around.self_attn.batch_first)
        found = self._axes.get(shape[:2], set())
        return next(iter(found)) if len(found) == 1 else -1

    def _learn(self, shape: tuple[int, ...], axis: int) -> None:
        if len(shape) == 3:
            one, other = shape[:2]
            self._axes.setdefault((one, other), set()).add(axis)
            self._axes.setdefault((other, one), set()).add(1 - axis)


def _declared_causality(model: nn.Module) -> Iterator[bool]:
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            yield True  # its mask is an argument of each call, so it may be causal
        elif isinstance(causal := getattr(module, "is_causal", None), bool):
            yield causal


def _caches_its_own(attention: nn.Module) -> bool:
    """True for causal self-attention that appends to a cache; an encoder has no cache."""
    takes_cache = "past_key_values" in inspect.signature(attention.forward).parameters
    crosses = getattr(attention, "is_cross_attention", False)
    return takes_cache and not crosses and getattr(attention, "is_causal", False) is True
