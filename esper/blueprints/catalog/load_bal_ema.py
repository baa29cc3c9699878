"""BP-LOAD-BAL-EMA: balances the use of a router's experts, without a loss."""

from __future__ import annotations

from typing import Any

from esper.blueprints.base import Graft, check_number
from esper.blueprints.initial import Initializer
from esper.blueprints.routing import RouterPart, UseBalancer
from esper.contracts import AdaptationType, BlueprintCategory, LayerInfo
from esper.exceptions import ConfigurationError


class LoadBalEma(RouterPart):
    slug = "load_bal_ema"
    id = "BP-LOAD-BAL-EMA"
    title = "Expert load balancer"
    category = BlueprintCategory.ROUTING
    adaptation_type = AdaptationType.ADD_ROUTING
    idea = (
        "Keeps a running mean of each expert's use and shifts the router's choice, not its gates, "
        "towards experts that are used little."
    )
    source = "Wang et al. 2024, arXiv 2408.15664; DeepSeek-V3 2024, arXiv 2412.19437"
    when = "A router uses few of its experts, and no further loss is wanted."

    replicas_refusal = (
        "each rank counts only its own batch, so the ranks would prefer different experts"
    )

    def default_config(self, layer: LayerInfo) -> dict[str, Any]:
        return {"decay": 0.99, "rate": 0.01}

    def check_config(self, config: dict[str, Any]) -> None:
        check_number(config, "decay", low=0.0, high=1.0)
        check_number(config, "rate", low=0.0, high=1.0)
        if config["decay"] == 1:
            raise ConfigurationError("decay must be below 1, otherwise no use is ever counted")

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        return UseBalancer(decay=config["decay"], rate=config["rate"], device=weights.device)
