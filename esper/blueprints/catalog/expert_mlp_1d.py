"""BP-EXPERT-MLP-1D: one GELU expert beside the layer."""

from __future__ import annotations

from typing import ClassVar

from esper.blueprints.feedforward import GeluFeedForward
from esper.contracts import AdaptationType, BlueprintCategory


class ExpertMlp1d(GeluFeedForward):
    """On its own, no router decides: every position passes through it."""

    slug = "expert_mlp_1d"
    id = "BP-EXPERT-MLP-1D"
    title = "Single expert (GELU)"
    category = BlueprintCategory.MIXTURE_OF_EXPERTS
    adaptation_type = AdaptationType.ADD_MOE
    hidden_at_width = (3072, 768)
    idea = "Adds one GELU expert beside the layer, four times as wide; every position uses it."
    source = "experts: Shazeer et al. 2017, arXiv 1701.06538; GELU: arXiv 1606.08415"
    when = "The layer carries a feed-forward branch already and the loss is flat all the same."
    conflicts: ClassVar[frozenset[str]] = frozenset({"expert_mlp_swiglu"})
