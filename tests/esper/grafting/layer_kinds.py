"""One small model around each kind of layer that a graft may meet.

``python -m tests.esper.grafting.layer_kinds`` writes ``support_table.txt``: which
blueprint fits which kind, and why the others are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from esper import blueprints
from esper.contracts import LayerInfo
from esper.grafting import trace_layers

SUPPORT_TABLE = Path(__file__).parent / "support_table.txt"
VOCABULARY = 23


class Around(nn.Module):
    """Something before the layer and something that draws and writes in place after it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.gain = nn.Parameter(torch.ones(()))
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(torch.relu_(self.run(x * self.gain if x.is_floating_point() else x)))

    def run(self, x: Tensor) -> Tensor:
        output = self.layer(x)
        return output[0] if isinstance(output, tuple) else output


class AroundRecurrent(Around):
    def run(self, x: Tensor) -> Tensor:
        return super().run(x).clone()  # torch keeps it for backward: no one may write to it


class AroundAttention(Around):
    def run(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


class AroundPacked(Around):
    def run(self, x: Tensor) -> Tensor:
        lengths = torch.arange(x.shape[1], x.shape[1] - x.shape[0], -1)
        output: PackedSequence = self.layer(pack_padded_sequence(x, lengths, batch_first=True))[0]
        return output.data


class AroundStrided(Around):
    def run(self, x: Tensor) -> Tensor:
        return self.layer(x.mT).mT


class CalledTwice(Around):
    def run(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Tied(nn.Module):
    """Its table is its head's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 16)
        self.layer = nn.Linear(16, VOCABULARY, bias=False)
        self.layer.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(self.table(tokens))


class Logits(nn.Module):
    """A model of transformers that answers with a plain tensor."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens, use_cache=False).logits


class Mixer(nn.Module):
    """A layer class of somebody's own, which mixes positions: nothing is known of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ts,bsc->btc", self.weight, x)


@dataclass(frozen=True)
class Kind:
    """How to make the model, what it eats, and which of its layers is meant."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layer: str = "layer"
    tokens: bool = False


def _around(make: Callable[[], nn.Module], *shape: int, around: type[Around] = Around) -> Kind:
    return Kind(lambda: around(make()), shape)


def _gpt2() -> nn.Module:
    config = GPT2Config(
        n_layer=1,
        n_embd=32,
        n_head=2,
        n_positions=16,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Logits(GPT2LMHeadModel(config))


def _llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Logits(LlamaForCausalLM(config))


def _bert() -> nn.Module:
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=VOCABULARY,
    )
    return Logits(BertForMaskedLM(config))


def _transformers(make: Callable[[], nn.Module], layer: str) -> Kind:
    return Kind(make, (2, 6), layer=f"net.{layer}", tokens=True)


KINDS: dict[str, Kind] = {
    "linear_2d": _around(lambda: nn.Linear(12, 8), 5, 12),
    "linear_3d": _around(lambda: nn.Linear(16, 16), 2, 5, 16),
    "linear_4d": _around(lambda: nn.Linear(8, 8), 2, 3, 4, 8),
    "linear_unbatched": _around(lambda: nn.Linear(8, 8), 8),
    "linear_no_bias": _around(lambda: nn.Linear(12, 8, bias=False), 5, 12),
    "linear_one_channel": _around(lambda: nn.Linear(1, 1), 2, 5, 1),
    "linear_strided": _around(lambda: nn.Linear(16, 16), 2, 16, 5, around=AroundStrided),
    "linear_called_twice": _around(lambda: nn.Linear(16, 16), 2, 5, 16, around=CalledTwice),
    "linear_weight_norm": _around(lambda: weight_norm(nn.Linear(16, 16)), 2, 5, 16),
    "linear_frozen": _around(lambda: nn.Linear(16, 16).requires_grad_(False), 2, 5, 16),
    "linear_tied": Kind(Tied, (2, 5), tokens=True),
    "conv1d": _around(lambda: nn.Conv1d(4, 8, 5, padding=2), 2, 4, 9),
    "conv2d": _around(lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1), 2, 4, 8, 8),
    "conv2d_no_bias": _around(lambda: nn.Conv2d(4, 8, 3, padding=1, bias=False), 2, 4, 6, 6),
    "conv2d_unpadded": _around(lambda: nn.Conv2d(4, 8, 3), 2, 4, 8, 8),
    "conv2d_dilated": _around(lambda: nn.Conv2d(4, 4, 3, padding="same", dilation=2), 2, 4, 8, 8),
    "conv2d_reflecting": _around(
        lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), 2, 4, 8, 8
    ),
    "conv2d_grouped": _around(lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2), 2, 8, 6, 6),
    "conv2d_depthwise": _around(lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), 2, 8, 6, 6),
    "conv2d_one_channel": _around(lambda: nn.Conv2d(1, 1, 3, padding=1), 2, 1, 6, 6),
    "conv2d_unbatched": _around(lambda: nn.Conv2d(4, 8, 3, padding=1), 4, 6, 6),
    "conv3d": _around(lambda: nn.Conv3d(4, 8, 3, padding=1), 2, 4, 4, 4, 4),
    "conv_transpose2d": _around(lambda: nn.ConvTranspose2d(4, 8, 3, stride=2), 2, 4, 5, 5),
    "layer_norm": _around(lambda: nn.LayerNorm(16), 2, 5, 16),
    "layer_norm_two_axes": _around(lambda: nn.LayerNorm((5, 16)), 2, 5, 16),
    "layer_norm_no_bias": _around(lambda: nn.LayerNorm(16, bias=False), 2, 5, 16),
    "rms_norm": _around(lambda: nn.RMSNorm(16), 2, 5, 16),
    "batch_norm1d": _around(lambda: nn.BatchNorm1d(8), 6, 8),
    "batch_norm2d": _around(lambda: nn.BatchNorm2d(8), 4, 8, 3, 3),
    "group_norm": _around(lambda: nn.GroupNorm(2, 8), 4, 8, 3, 3),
    "instance_norm2d": _around(lambda: nn.InstanceNorm2d(8, affine=True), 4, 8, 3, 3),
    "multihead_attention": _around(
        lambda: nn.MultiheadAttention(16, 2, batch_first=True), 2, 5, 16, around=AroundAttention
    ),
    "embedding": Kind(lambda: Around(nn.Embedding(VOCABULARY, 8)), (2, 5), tokens=True),
    "embedding_bag": Kind(lambda: Around(nn.EmbeddingBag(VOCABULARY, 8)), (2, 5), tokens=True),
    "lstm": _around(lambda: nn.LSTM(8, 12, batch_first=True), 2, 5, 8, around=AroundRecurrent),
    "lstm_both_ways": _around(
        lambda: nn.LSTM(8, 12, bidirectional=True), 5, 2, 8, around=AroundRecurrent
    ),
    "lstm_packed": _around(lambda: nn.LSTM(8, 12, batch_first=True), 2, 5, 8, around=AroundPacked),
    "gru": _around(lambda: nn.GRU(8, 12, batch_first=True), 2, 5, 8, around=AroundRecurrent),
    "own_class": _around(Mixer, 2, 5, 8),
    "gpt2_conv1d": _around(lambda: Conv1D(48, 16), 2, 5, 16),
    "gpt2_queries_keys_values": _transformers(_gpt2, "transformer.h.0.attn.c_attn"),
    "gpt2_attention_out": _transformers(_gpt2, "transformer.h.0.attn.c_proj"),
    "llama_query": _transformers(_llama, "model.layers.0.self_attn.q_proj"),
    "llama_key": _transformers(_llama, "model.layers.0.self_attn.k_proj"),
    "llama_value": _transformers(_llama, "model.layers.0.self_attn.v_proj"),
    "llama_norm": _transformers(_llama, "model.norm"),
    "bert_key": _transformers(_bert, "bert.encoder.layer.0.attention.self.key"),
}


@dataclass
class Subject:
    """A fresh model with a batch for it and the description of the layer that is meant."""

    model: nn.Module
    x: Tensor
    info: LayerInfo
    autocast: bool = False

    def run(self, model: nn.Module) -> Tensor:
        """Of ``model``, which may be a copy; autocast is entered anew, as in a training loop."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            return model(self.x)

    @property
    def host(self) -> nn.Module:
        return self.model.get_submodule(self.info.name)


def make_subject(kind: str, dtype: torch.dtype = torch.float32) -> Subject:
    torch.manual_seed(0)
    chosen = KINDS[kind]
    model = chosen.make().to(dtype).train()
    x = torch.randint(0, VOCABULARY, chosen.shape) if chosen.tokens else torch.randn(chosen.shape)
    x = x if chosen.tokens else x.to(dtype)
    infos = trace_layers(model, lambda: model(x))
    return Subject(model, x, next(info for info in infos if info.name == chosen.layer))


@cache
def described(kind: str) -> LayerInfo:
    return make_subject(kind).info


def reasons(blueprint: Any) -> Iterator[tuple[str, str]]:
    """(kind, why not) for every kind; empty where the blueprint fits."""
    return ((kind, blueprint.supports(described(kind))) for kind in KINDS)


def supported_pairs() -> list[tuple[str, str]]:
    """(slug, kind) of everything that fits."""
    return [
        (blueprint.slug, kind)
        for blueprint in blueprints.list_blueprints()
        for kind, reason in reasons(blueprint)
        if not reason
    ]


def support_table() -> str:
    """One paragraph a blueprint: the kinds it fits, then each refusal with its kinds."""
    return "\n\n".join(_paragraph(blueprint) for blueprint in blueprints.list_blueprints()) + "\n"


def _paragraph(blueprint: Any) -> str:
    by_reason: dict[str, list[str]] = {}
    for kind, reason in reasons(blueprint):
        info = described(kind)
        brief = reason.replace(info.kind, "<kind>", 1).replace(str(list(info.in_shape)), "<shape>")
        by_reason.setdefault(brief, []).append(kind)
    fits = by_reason.pop("", [])
    lines = [blueprint.slug, *_wrapped("  fits", fits)]
    for reason, kinds in by_reason.items():
        lines += [f"  no: {reason}", *_wrapped("     ", kinds)]
    return "\n".join(lines)


def _wrapped(start: str, words: list[str]) -> list[str]:
    lines, line = [], start
    for word in words:
        if len(line) + len(word) > 98:
            lines.append(line)
            line = " " * len(start)
        line += f" {word}"
    return [*lines, line]


if __name__ == "__main__":
    SUPPORT_TABLE.write_text(support_table())
