"""BP-EXPERT-MLP-SWIGLU: one gated expert beside the layer."""

from __future__ import annotations

from typing import ClassVar

from esper.blueprints.experts import SwigluExpert


class ExpertMlpSwiglu(SwigluExpert):
    slug = "expert_mlp_swiglu"
    id = "BP-EXPERT-MLP-SWIGLU"
    title = "Single expert (SwiGLU)"
    hidden_at_width = (3072, 768)
    idea = (
        "Adds one gated expert beside the layer, four times as wide; every position uses it "
        "as much as its own gate says, or its share of the softmax of a router that is there."
    )
    source = "experts: Shazeer et al. 2017, arXiv 1701.06538; SwiGLU: arXiv 2002.05202"
    when = "As expert_mlp_1d, where 1.5 times the weights are affordable and gating helps."
    conflicts: ClassVar[frozenset[str]] = frozenset({"expert_mlp_1d"})
