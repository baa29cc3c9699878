"""BP-ATTN-STD: a pre-norm multi-head self-attention branch beside the layer."""

from __future__ import annotations

from typing import ClassVar

from esper.blueprints.attention import SelfAttention


class AttnStd(SelfAttention):
    slug = "attn_std"
    id = "BP-ATTN-STD"
    title = "Self-attention branch"
    idea = "Adds multi-head self-attention beside the layer: positions exchange information."
    source = "Vaswani et al. 2017, arXiv 1706.03762; pre-norm: Xiong et al. 2020, arXiv 2002.04745"
    when = "Sequence model whose layers mix too little over time. Masks of the host are not seen."
    conflicts: ClassVar[frozenset[str]] = frozenset({"attn_split_qk"})
