"""Models as their libraries define them, built tiny from configurations: nothing is downloaded.

Every specimen is a model, a few fixed batches and the user's own loss line. None of them knows
Esper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, rnn

from tests.matrix.foreign_torchvision import declare_missing_operators

declare_missing_operators()  # before transformers or timm import torchvision, where it is installed

VOCABULARY = 32
BATCHES = 4
ROWS = 2


@dataclass(frozen=True)
class Specimen:
    """A model under test.

    Attributes:
        library: whose definition it is; those of :data:`THIRD_PARTY` are no part of ``./check``.
        make: (model, batches, loss of a model on a batch); seeded by the caller.
        trap: what makes it hard.
        steps: with a graft, and again after the undo.
        layers_per_kind: how many of each kind get every blueprint.
    """

    name: str
    library: str
    make: Callable[[], tuple[nn.Module, list[Any], Callable[[Any, Any], Tensor]]]
    trap: str
    steps: int
    layers_per_kind: int


THIRD_PARTY = frozenset({"torchvision", "timm"})
ZOO: dict[str, Specimen] = {}
Made = tuple[nn.Module, list[Any], Callable[[Any, Any], Tensor]]


def specimen(
    name: str, library: str, trap: str, *, steps: int = 20, layers_per_kind: int = 1
) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Enters a model in the zoo."""

    def enter(make: Callable[[], Made]) -> Callable[[], Made]:
        ZOO[name] = Specimen(name, library, make, trap, steps, layers_per_kind)
        return make

    return enter


# -- batches and losses ----------------------------------------------------------------------------


def token_batches(length: int = 8) -> list[Tensor]:
    return [torch.randint(3, VOCABULARY, (ROWS, length)) for _ in range(BATCHES)]


def picture_batches(size: int = 32, classes: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(ROWS, 3, size, size), torch.randint(0, classes, (ROWS,)))
            for _ in range(BATCHES)]  # fmt: skip


def vector_batches(width: int, classes: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, width), torch.randint(0, classes, (8,))) for _ in range(BATCHES)]


def language_loss(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def huggingface_picture_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(pixel_values=batch[0], labels=batch[1]).loss


def class_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def next_token_loss(model: Any, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


# -- transformers ----------------------------------------------------------------------------------


@specimen("gpt2", "transformers", "transposed layers, a tied head")
def gpt2() -> Made:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2,
                        bos_token_id=None, eos_token_id=None)  # fmt: skip
    return GPT2LMHeadModel(config), token_batches(), language_loss


def _decoder(**more: Any) -> dict[str, Any]:
    return {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 16, "bos_token_id": None, "eos_token_id": None,
            "pad_token_id": None, **more}  # fmt: skip


@specimen("llama", "transformers", "grouped-query attention, RMSNorm, rotary buffers")
def llama() -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_decoder())), token_batches(), language_loss


@specimen("mixtral", "transformers", "fused 3-D expert weights")
def mixtral() -> Made:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_decoder(num_local_experts=4, num_experts_per_tok=2))
    return MixtralForCausalLM(config), token_batches(), language_loss


@specimen("qwen2_moe", "transformers", "shared and routed experts")
def qwen2_moe() -> Made:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(**_decoder(num_experts=4, num_experts_per_tok=2,
                                       moe_intermediate_size=8,
                                       shared_expert_intermediate_size=8))  # fmt: skip
    return Qwen2MoeForCausalLM(config), token_batches(), language_loss


def _encoder(**more: Any) -> dict[str, Any]:
    return {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16,
            "pad_token_id": 0, **more}  # fmt: skip


@specimen("bert", "transformers", "a tied head with a bias of its own")
def bert() -> Made:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**_encoder())), token_batches(), language_loss


@specimen("albert", "transformers", "one layer that is called three times")
def albert() -> Made:
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig(**_encoder(num_hidden_layers=3, embedding_size=8))
    return AlbertForMaskedLM(config), token_batches(), language_loss


@specimen("t5", "transformers", "one embedding under several names, encoder and decoder")
def t5() -> Made:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2,
                      num_heads=2, decoder_start_token_id=0, pad_token_id=0)  # fmt: skip
    return T5ForConditionalGeneration(config), token_batches(), language_loss


@specimen("wav2vec2", "transformers", "a weight-normed grouped convolution, masking by numpy")
def wav2vec2() -> Made:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8),
        num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
        mask_time_length=2, layerdrop=0.0, pad_token_id=0,
    )  # fmt: skip
    batches = [(torch.randn(ROWS, 640), torch.randint(1, 8, (ROWS, 5))) for _ in range(BATCHES)]

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(input_values=batch[0], labels=batch[1]).loss

    return Wav2Vec2ForCTC(config), batches, loss


@specimen("convnextv2", "transformers", "global response norm, a LayerNorm over channels first")
def convnextv2() -> Made:
    from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

    config = ConvNextV2Config(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_labels=4,
                              drop_path_rate=0.1)  # fmt: skip
    return ConvNextV2ForImageClassification(config), picture_batches(), huggingface_picture_loss


@specimen("resnet", "transformers", "BatchNorm, in-place ReLU")
def resnet() -> Made:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                          layer_type="basic", num_labels=4)  # fmt: skip
    return ResNetForImageClassification(config), picture_batches(), huggingface_picture_loss


@specimen("vit", "transformers", "a class token and positions that are bare parameters")
def vit() -> Made:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=24, image_size=16, patch_size=8, num_labels=4)  # fmt: skip
    return ViTForImageClassification(config), picture_batches(16), huggingface_picture_loss


# -- torch -----------------------------------------------------------------------------------------


class EncoderLanguageModel(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, VOCABULARY)
        self.batch_first = batch_first

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        x = self.embed(ids)
        if not self.batch_first:
            return self.head(self.encoder(x.transpose(0, 1), mask=mask)).transpose(0, 1)
        return self.head(self.encoder(x, mask=mask))


@specimen("transformer_encoder", "torch", "attention whose output projection is no call")
def transformer_encoder() -> Made:
    return EncoderLanguageModel(batch_first=True), token_batches(), next_token_loss


@specimen("transformer_encoder_time_first", "torch", "the sequence axis comes first")
def transformer_encoder_time_first() -> Made:
    return EncoderLanguageModel(batch_first=False), token_batches(), next_token_loss


class RecurrentLanguageModel(nn.Module):
    """With ``lengths``, on a packed sequence."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.recurrent = kind(12, 16, num_layers=2, batch_first=True, dropout=0.1)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        x: Any = self.embed(ids)
        if lengths is not None:
            x = rnn.pack_padded_sequence(x, lengths, batch_first=True)
        y, _ = self.recurrent(x)
        if lengths is not None:
            y, _ = rnn.pad_packed_sequence(y, batch_first=True)
        return self.head(self.norm(y))


def packed_loss(model: Any, ids: Tensor) -> Tensor:
    lengths = torch.tensor([ids.shape[1] - 1, ids.shape[1] - 3])
    logits = model(ids[:, :-1], lengths)
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1 : 1 + logits.shape[1]].flatten())


@specimen("lstm", "torch", "flattened weights, two layers in one module")
def lstm() -> Made:
    return RecurrentLanguageModel(nn.LSTM), token_batches(), next_token_loss


@specimen("gru", "torch", "flattened weights")
def gru() -> Made:
    return RecurrentLanguageModel(nn.GRU), token_batches(), next_token_loss


@specimen("lstm_packed", "torch", "packed sequences: the layer's input is no tensor")
def lstm_packed() -> Made:
    return RecurrentLanguageModel(nn.LSTM), token_batches(), packed_loss


class ScaleNorm(nn.Module):
    """A norm that no library knows; its gain is one number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(float(width) ** 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain / x.norm(dim=-1, keepdim=True).clamp(min=1e-6)


@specimen(
    "custom_norm",
    "torch",
    "a norm of one's own, with a parameter that has no axis",
    layers_per_kind=2,
)
def custom_norm() -> Made:
    model = nn.Sequential(nn.Linear(8, 16), ScaleNorm(16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    return model, vector_batches(8, 4), class_loss


@specimen(
    "weight_norm",
    "torch",
    "the weight is made anew from two others in each pass",
    layers_per_kind=2,
)
def weight_norm() -> Made:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 16)),
        nn.GELU(),
        parametrizations.weight_norm(nn.Linear(16, 16)),
        nn.LayerNorm(16),
        nn.Linear(16, 4),
    )
    return model, vector_batches(8, 4), class_loss


@specimen("spectral_norm", "torch", "buffers that move in each training pass")
def spectral_norm() -> Made:
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 8, 3, padding=1)),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        parametrizations.spectral_norm(nn.Linear(8, 4)),
    )
    return model, picture_batches(8), class_loss


@specimen(
    "old_weight_norm",
    "torch",
    "the hooks of torch.nn.utils.weight_norm's first form",
    layers_per_kind=2,
)
def old_weight_norm() -> Made:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        first = nn.utils.weight_norm(nn.Linear(8, 16))
    model = nn.Sequential(first, nn.GELU(), nn.utils.spectral_norm(nn.Linear(16, 4)))
    return model, vector_batches(8, 4), class_loss


class OddBuffers(nn.Module):
    """Complex, integer and empty buffers, one outside the state dict, one replaced each step."""

    seen: Tensor
    rotation: Tensor
    latest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(8, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)
        self.register_buffer("rotation", torch.polar(torch.ones(8), torch.linspace(0, 3, 8)))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("absent", None)
        self.register_buffer("latest", torch.zeros(16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        h = self.lift(x)
        pairs = torch.view_as_complex(h.reshape(-1, 8, 2).contiguous())
        h = torch.view_as_real(pairs * self.rotation).flatten(-2)
        h = self.mix(h) + 0.01 * self.latest
        self.latest = h.detach().mean(dim=0)  # a new tensor under the old name
        return self.head(F.gelu(h))


@specimen("odd_buffers", "torch", "complex, integer, empty and replaced buffers", layers_per_kind=2)
def odd_buffers() -> Made:
    return OddBuffers(), vector_batches(8, 4), class_loss


class TwoNames(nn.Module):
    """One module under two names, called under both; and one whose weight alone is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.alias = self.inner
        self.blocks = nn.ModuleList([nn.Sequential(self.inner, nn.Tanh()), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 4)
        self.other_head = nn.Linear(8, 4)
        self.other_head.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks[0](x) + self.alias(x)
        h = torch.tanh(self.blocks[1](h))
        return self.head(h) + self.other_head(x)


@specimen(
    "two_names", "torch", "a module under three names, a weight of two layers", layers_per_kind=2
)
def two_names() -> Made:
    return TwoNames(), vector_batches(8, 4), class_loss


@specimen("lazy", "torch", "modules that get their weights in the first pass", layers_per_kind=2)
def lazy() -> Made:
    model = nn.Sequential(nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(4))
    batches = vector_batches(8, 4)
    model(batches[0][0])  # as torch tells one to, before the optimizer is made
    return model, batches, class_loss


# -- torchvision and timm --------------------------------------------------------------------------


@specimen("resnet18", "torchvision", "in-place ReLU after every sum", steps=5)
def resnet18() -> Made:
    import torchvision

    return torchvision.models.resnet18(num_classes=4), picture_batches(16), class_loss


@specimen("vision_transformer", "torchvision", "nn.MultiheadAttention in a sum with dropout")
def vision_transformer() -> Made:
    import torchvision

    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24,
        num_classes=4, dropout=0.1,
    )  # fmt: skip
    return model, picture_batches(16), class_loss


@specimen("mobilenet_v3", "torchvision", "depthwise convolutions, squeeze and excite")
def mobilenet_v3() -> Made:
    import torchvision

    model = torchvision.models.mobilenet_v3_small(num_classes=4, width_mult=0.25)
    return model, picture_batches(), class_loss


def _timm(name: str, **settings: Any) -> Made:
    import timm

    return timm.create_model(name, num_classes=4, **settings), picture_batches(160), class_loss


@specimen("test_convnext", "timm", "a LayerNorm class of its own over channels first")
def timm_convnext() -> Made:
    return _timm("test_convnext", drop_path_rate=0.1)


@specimen("test_vit", "timm", "attention in one fused projection")
def timm_vit() -> Made:
    return _timm("test_vit")


@specimen("test_efficientnet", "timm", "a BatchNorm that holds its own activation")
def timm_efficientnet() -> Made:
    return _timm("test_efficientnet", drop_rate=0.1)
