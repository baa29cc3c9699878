"""An int8 cache for transformers' ``generate``, in the layers that were trained with rounding.

Shape legend: B batch, G key heads, T time, D width of one head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from esper.blueprints.key_value import RoundedKeyValue, quantise, restore
from esper.exceptions import ConfigurationError
from esper.grafting.slot import slots


class Int8Layer(DynamicLayer):
    """One layer's keys and values, int8 [B, G, T, D] with a peak [B, G, T, 1] for each head.

    Only what one call of ``update`` returns is as wide as the model, and only while it is used.

    Args:
        keys, values: which of the two are held as int8; the other stays as it is.
    """

    def __init__(self, *, keys: bool = True, values: bool = True) -> None:
        super().__init__()
        self._quantises = {"keys": keys, "values": values}
        self._peaks: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends, and returns all that is held in the dtype of the model."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys = self.values = None
        return self._append("keys", key_states), self._append("values", value_states)

    def offload(self) -> None:
        self._change(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._change(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reset(self) -> None:
        self._peaks.clear()
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("give the number of tokens to remove as a negative number")
        if tokens_to_remove:
            self._change(lambda tensor: tensor[..., :tokens_to_remove, :])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda tensor: tensor[indices, ...])

    def _append(self, name: str, fresh: Tensor) -> Tensor:
        if not self._quantises[name]:
            held = _joined(getattr(self, name), fresh)
            setattr(self, name, held)
            return held
        codes, peaks = quantise(fresh)
        held = _joined(getattr(self, name), codes)
        setattr(self, name, held)
        self._peaks[name] = _joined(self._peaks.get(name), peaks)
        return restore(held, self._peaks[name])

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.get_seq_length():
            return
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = change(self.keys), change(self.values)
        self._peaks = {name: change(peaks) for name, peaks in self._peaks.items()}


def int8_cache(model: nn.Module) -> Cache:
    """A fresh cache for one ``model.generate(…, past_key_values=…)``.

    It holds int8 where ``kv_cache_8bit`` was grafted, and leaves all other layers as they are.

    Raises:
        ConfigurationError: it was grafted into no layer of the model, or such a layer keeps its
            keys in a way that this cache does not support (a sliding window, for example).
    """
    wanted = _rounded_layers(model)
    if not wanted:
        raise ConfigurationError("kv_cache_8bit is not grafted into any layer of this model")
    config: Any = model.config
    cache = DynamicCache(config=config)
    for index, parts in wanted.items():
        plain = cache.layers[index] if index < len(cache.layers) else None
        if type(plain) is not DynamicLayer:
            raise ConfigurationError(
                f"layer {index} keeps its keys and values in a {type(plain).__name__}, "
                "which cannot be held as int8"
            )
        cache.layers[index] = Int8Layer(**parts)
    return cache


def _rounded_layers(model: nn.Module) -> dict[int, dict[str, bool]]:
    """Index in the cache -> which of keys and values are rounded there."""
    found: dict[int, dict[str, bool]] = {}
    for name, _, slot in slots(model):
        if not any(isinstance(graft, RoundedKeyValue) for graft in slot.grafts().values()):
            continue
        parent, _, child = name.rpartition(".")
        attention: Any = model.get_submodule(parent)
        parts = found.setdefault(attention.layer_idx, {"keys": False, "values": False})
        parts["keys"] |= not child.startswith("v")  # a fused projection makes both
        parts["values"] |= not child.startswith("k")
    return found


def _joined(held: Tensor | None, fresh: Tensor) -> Tensor:
    return fresh if held is None else torch.cat([held, fresh], dim=-2)
