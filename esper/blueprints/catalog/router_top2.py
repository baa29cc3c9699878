"""BP-ROUTER-TOP2: a noisy top-2 router over experts beside the layer."""

from __future__ import annotations

from typing import ClassVar

from esper.blueprints.routing import RouterBlueprint


class RouterTop2(RouterBlueprint):
    slug = "router_top2"
    id = "BP-ROUTER-TOP2"
    title = "Top-2 router with experts"
    idea = "Adds several GELU experts beside the layer; each position passes through two of them."
    source = "Shazeer et al. 2017, arXiv 1701.06538; noise: Riquelme et al. 2021, arXiv 2106.05974"
    when = "The layer is too small for what it sees, and most positions need only a part of it."
    conflicts: ClassVar[frozenset[str]] = frozenset({"router_moe_auxloss"})
