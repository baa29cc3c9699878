"""BP-ROUTER-MOE-AUXLOSS: the top-2 router with a load-balancing loss."""

from __future__ import annotations

from typing import Any, ClassVar

from esper.blueprints import layout
from esper.blueprints.base import Graft, check_integer, check_number
from esper.blueprints.initial import Initializer
from esper.blueprints.routing import (
    DEFAULT_RAMP_STEPS,
    FLOAT32_BYTES,
    MAX_RAMP_STEPS,
    LossRouter,
    RouterBlueprint,
)
from esper.contracts import LayerInfo


class RouterMoeAuxloss(RouterBlueprint):
    slug = "router_moe_auxloss"
    id = "BP-ROUTER-MOE-AUXLOSS"
    title = "Top-2 router with balancing loss"
    idea = (
        "As router_top2, and a loss that grows when few experts do all the work is added in the "
        "backward pass."
    )
    source = "Fedus et al. 2021, arXiv 2101.03961; Lepikhin et al. 2020, arXiv 2006.16668"
    when = "The layer is too small for what it sees, and a plain router would use few experts."
    conflicts: ClassVar[frozenset[str]] = frozenset({"router_top2"})
    scaler_refusal = (
        "a gradient scaler multiplies the user's loss, but not the loss that the router adds"
    )

    def default_config(self, layer: LayerInfo) -> dict[str, Any]:
        own = {"coefficient": 0.01, "ramp_steps": DEFAULT_RAMP_STEPS}
        return {**super().default_config(layer), **own}

    def check_config(self, config: dict[str, Any]) -> None:
        super().check_config(config)
        check_number(config, "coefficient", low=0.0, high=10.0)
        check_integer(config, "ramp_steps", low=1, high=MAX_RAMP_STEPS)

    def activation_bytes(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        # Also kept, in float32: each position's softmax over all experts, and their shares.
        rows = layout.position_count(layer, of_output=True)
        kept = (rows + 1) * int(config["experts"]) + 1
        return super().activation_bytes(layer, config) + kept * FLOAT32_BYTES

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        return LossRouter(
            **self._arguments(layer, config, weights),
            coefficient=config["coefficient"],
            ramp_steps=config["ramp_steps"],
        )
