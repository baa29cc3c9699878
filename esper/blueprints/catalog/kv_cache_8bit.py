"""BP-KV-CACHE-8BIT: a decoder adapts to keys and values of eight bits."""

from __future__ import annotations

from typing import Any

from esper.blueprints import layout
from esper.blueprints.base import Blueprint, Graft, check_integer
from esper.blueprints.initial import Initializer
from esper.blueprints.key_value import RoundedKeyValue
from esper.contracts import AdaptationType, BlueprintCategory, GraftKind, LayerInfo, Risk

# No longer than a run's maturity_steps: the verdict then compares the finished rounding.
DEFAULT_RAMP_STEPS = 50
MAX_RAMP_STEPS = 10_000


class KvCache8bit(Blueprint):
    """For the projections that compute keys and values: both, or one of them.

    In training it rounds their outputs as the cache will, faded in by a schedule, because rounding
    changes the output. ``esper.int8_cache(model)`` then gives ``generate`` a cache that
    holds int8 for each layer with this graft. If a model rotates its keys after the projection
    (rotary positions), the cache rounds the rotated keys: noise of the same size, but not the
    same noise.
    """

    slug = "kv_cache_8bit"
    id = "BP-KV-CACHE-8BIT"
    title = "Keys and values in eight bits"
    category = BlueprintCategory.EFFICIENCY
    kind = GraftKind.REPLACE
    adaptation_type = AdaptationType.ADD_EFFICIENCY
    risk = Risk.HIGH
    trainable = False
    idea = "Rounds a decoder's keys and values to eight bits, so that its cache can be int8."
    source = (
        "quantised keys and values while training: Liu et al. 2023, arXiv 2305.17888; "
        "straight-through gradient: Bengio et al. 2013, arXiv 1308.3432"
    )
    when = "The model will generate long texts, and the cache of keys and values fills the memory."

    def supports(self, layer: LayerInfo) -> str:
        if not layer.graftable:
            return layer.reason
        if layer.kind in layout.ATTENTION:
            return "its keys and values are used in one fused call that keeps no cache"
        if not (layer.head_width and layer.cached_channels):
            return f"no cache is known to keep the output of this {layer.kind}"
        return ""

    def default_config(self, layer: LayerInfo) -> dict[str, Any]:
        return {"ramp_steps": DEFAULT_RAMP_STEPS}

    def sizes(self, layer: LayerInfo) -> tuple[dict[str, Any], ...]:
        return (self.default_config(layer),)

    def check_config(self, config: dict[str, Any]) -> None:
        check_integer(config, "ramp_steps", low=1, high=MAX_RAMP_STEPS)

    def parameters(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return 0

    def flops(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        # For each value: magnitude, share, level, rounding, back (2), mixing (3).
        first, end = layer.cached_channels
        return 9 * layout.position_count(layer, of_output=True) * (end - first)

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        return RoundedKeyValue(
            head_width=layer.head_width,
            cached_channels=layer.cached_channels,
            ramp_steps=config["ramp_steps"],
            device=weights.device,
        )
