"""BP-EXPERT-MLP-1D: one GELU expert beside the layer."""

from __future__ import annotations

from typing import ClassVar

from esper.blueprints.experts import GeluExpert


class ExpertMlp1d(GeluExpert):
    slug = "expert_mlp_1d"
    id = "BP-EXPERT-MLP-1D"
    title = "Single expert (GELU)"
    hidden_at_width = (3072, 768)
    idea = (
        "Adds one GELU expert beside the layer, four times as wide; every position uses it "
        "as much as its own gate says, or its share of the softmax of a router that is there."
    )
    source = "experts: Shazeer et al. 2017, arXiv 1701.06538; GELU: arXiv 1606.08415"
    when = "The layer has a feed-forward branch already, and the loss is still flat."
    conflicts: ClassVar[frozenset[str]] = frozenset({"expert_mlp_swiglu"})
