"""BP-MLP-SWIGLU-4096: a gated feed-forward branch beside the layer."""

from __future__ import annotations

from typing import ClassVar

from esper.blueprints.feedforward import SwigluFeedForward
from esper.contracts import AdaptationType, BlueprintCategory


class MlpSwiglu4096(SwigluFeedForward):
    slug = "mlp_swiglu_4096"
    id = "BP-MLP-SWIGLU-4096"
    title = "Feed-forward branch (SwiGLU)"
    category = BlueprintCategory.TRANSFORMER
    adaptation_type = AdaptationType.ADD_FFN
    hidden_at_width = (4096, 768)
    idea = "Adds a gated network of three matrices beside the layer, 4096/768 times as wide."
    source = "Shazeer 2020, arXiv 2002.05202"
    when = "As mlp_gelu_2048, where three times the weights are affordable and gating helps."
    conflicts: ClassVar[frozenset[str]] = frozenset({"mlp_gelu_2048"})
