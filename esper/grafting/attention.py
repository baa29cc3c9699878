"""What a model tells of its own attention: which layers make the keys and values that it caches.

Read from transformers' attention modules, which take a cache as ``past_key_values`` and name their
projections the same way in nearly all models. A module that is built otherwise tells nothing, and
then nothing is claimed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

_KEY_OR_VALUE = frozenset({"k_proj", "v_proj", "key", "value"})
_FUSED = "c_attn"  # GPT-2: queries, keys and values side by side, a third each
_HEAD_WIDTHS = ("head_dim", "attention_head_size")


def cached_part(model: nn.Module, name: str) -> dict[str, Any]:
    """``head_width`` and ``cached_channels`` of a layer, for its ``LayerInfo``.

    Returns:
        Nothing where the layer makes no keys or values that go into a cache, or Esper cannot tell.
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
    """True where every attention in the model says that it is not causal.

    False is the safe answer, so one that says nothing, or a model that can generate, makes it
    False: a branch that sees the future lets a language model's loss fall by cheating.
    """
    generates = getattr(model, "can_generate", None)
    if callable(generates) and generates():
        return False
    found = list(_declared_causality(model))
    return bool(found) and not any(found)


def _declared_causality(model: nn.Module) -> Iterator[bool]:
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            yield True  # its mask is an argument of each call, so it may be causal
        elif isinstance(causal := getattr(module, "is_causal", None), bool):
            yield causal


def _caches_its_own(attention: nn.Module) -> bool:
    """True for causal self-attention that appends to a cache; an encoder keeps none."""
    takes_cache = "past_key_values" in inspect.signature(attention.forward).parameters
    crosses = getattr(attention, "is_cross_attention", False)
    return takes_cache and not crosses and getattr(attention, "is_causal", False) is True
