"""BP-ATTN-SPLIT-QK: self-attention with keys and values of half the width, beside the layer."""

from __future__ import annotations

from typing import ClassVar

from esper.blueprints.attention import SelfAttention


class AttnSplitQk(SelfAttention):
    """Half the width because two query heads share one key and one value head.

    Narrower heads would also halve it, but then queries and keys would differ in width.
    """

    slug = "attn_split_qk"
    id = "BP-ATTN-SPLIT-QK"
    title = "Self-attention branch, half-width keys and values"
    queries_per_key = 2
    idea = "Adds self-attention beside the layer in which two query heads share one key and value."
    source = "grouped queries: Ainslie et al. 2023, arXiv 2305.13245; pre-norm: arXiv 2002.04745"
    when = "As attn_std, where its weights or memory are too much. Masks of the host are not seen."
    conflicts: ClassVar[frozenset[str]] = frozenset({"attn_std"})
