"""BP-MLP-GELU-2048: a GELU feed-forward branch beside the layer."""

from __future__ import annotations

from typing import ClassVar

from esper.blueprints.feedforward import GeluFeedForward
from esper.contracts import AdaptationType, BlueprintCategory


class MlpGelu2048(GeluFeedForward):
    slug = "mlp_gelu_2048"
    id = "BP-MLP-GELU-2048"
    title = "Feed-forward branch (GELU)"
    category = BlueprintCategory.TRANSFORMER
    adaptation_type = AdaptationType.ADD_FFN
    hidden_at_width = (2048, 768)
    idea = "Adds a two-layer GELU network beside the layer, 2048/768 times as wide."
    source = "Vaswani et al. 2017, arXiv 1706.03762; GELU: arXiv 1606.08415"
    when = "The layer is too small: the loss has flattened and gradients still agree."
    conflicts: ClassVar[frozenset[str]] = frozenset({"mlp_swiglu_4096"})
