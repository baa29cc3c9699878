"""BP-CAP-FUSE-HFFN: a capacity limit for the experts of a router."""

from __future__ import annotations

from typing import Any

from esper.blueprints.base import Graft, check_integer, check_number
from esper.blueprints.initial import Initializer
from esper.blueprints.routing import (
    DEFAULT_RAMP_STEPS,
    MAX_RAMP_STEPS,
    CapacityLimit,
    RouterPart,
)
from esper.contracts import AdaptationType, BlueprintCategory, LayerInfo

MAX_LEAST = 1 << 20


class CapFuseHffn(RouterPart):
    slug = "cap_fuse_hffn"
    id = "BP-CAP-FUSE-HFFN"
    title = "Expert capacity limit"
    category = BlueprintCategory.MIXTURE_OF_EXPERTS
    adaptation_type = AdaptationType.ADD_MOE
    idea = (
        "Lets an expert serve 1.25 times its fair share of positions at most, reached by schedule; "
        "the others keep the layer's own output."
    )
    source = "Lepikhin et al. 2020, arXiv 2006.16668; Fedus et al. 2021, arXiv 2101.03961"
    when = "One expert of a router gets most positions, and the time of a step depends on it."

    def default_config(self, layer: LayerInfo) -> dict[str, Any]:
        return {"factor": 1.25, "least": 4, "ramp_steps": DEFAULT_RAMP_STEPS}

    def check_config(self, config: dict[str, Any]) -> None:
        check_number(config, "factor", low=0.0, high=256.0)
        check_integer(config, "least", low=1, high=MAX_LEAST)
        check_integer(config, "ramp_steps", low=1, high=MAX_RAMP_STEPS)

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        return CapacityLimit(
            factor=config["factor"],
            least=config["least"],
            ramp_steps=config["ramp_steps"],
            device=weights.device,
        )
