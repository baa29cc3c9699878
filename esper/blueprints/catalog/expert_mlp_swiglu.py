"""BP-EXPERT-MLP-SWIGLU: one gated expert beside the layer."""

from __future__ import annotations

from typing import ClassVar

from esper.blueprints.feedforward import SwigluFeedForward
from esper.contracts import AdaptationType, BlueprintCategory


class ExpertMlpSwiglu(SwigluFeedForward):
    """On its own, no router decides: every position passes through it."""

    slug = "expert_mlp_swiglu"
    id = "BP-EXPERT-MLP-SWIGLU"
    title = "Single expert (SwiGLU)"
    category = BlueprintCategory.MIXTURE_OF_EXPERTS
    adaptation_type = AdaptationType.ADD_MOE
    hidden_at_width = (3072, 768)
    idea = "Adds one gated expert beside the layer, four times as wide; every position uses it."
    source = "experts: Shazeer et al. 2017, arXiv 1701.06538; SwiGLU: arXiv 2002.05202"
    when = "As expert_mlp_1d, where half as many weights again are affordable and gating pays."
    conflicts: ClassVar[frozenset[str]] = frozenset({"expert_mlp_1d"})
