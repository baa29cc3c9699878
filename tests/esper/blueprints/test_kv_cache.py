"""Keys and values in eight bits: rounded while training, held as int8 when generating."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import esper
from esper import blueprints
from esper.blueprints.key_value import LEVELS, quantise, restore, rounded
from esper.exceptions import ConfigurationError, IncompatibleLayerError
from esper.grafting import Receipt, trace_layers
from esper.sdk.export.generating import Int8Layer

VOCABULARY, HEAD_WIDTH = 61, 32
TOKENS = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(2))
NEW_TOKENS = 10


def tensors(layer: Any) -> list[Tensor]:
    """Everything that one layer of a cache holds."""
    peaks = layer._peaks.values() if isinstance(layer, Int8Layer) else ()
    return [tensor for tensor in (layer.keys, layer.values, *peaks) if tensor is not None]


def cache_bytes(cache: Any) -> int:
    return sum(tensor.nbytes for layer in cache.layers for tensor in tensors(layer))


def make_gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2,
        n_embd=2 * HEAD_WIDTH,
        n_head=2,
        n_positions=48,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=None,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model.eval()


def llama_settings() -> dict[str, Any]:
    """Four query heads share two heads of keys and values."""
    return {
        "hidden_size": 4 * HEAD_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": None,
    }


def make_llama() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**llama_settings()))
    return model.eval()


def rounded_layers(model: nn.Module) -> list[str]:
    blueprint = blueprints.get_blueprint("kv_cache_8bit")
    infos = trace_layers(model, lambda: model(TOKENS))
    return [info.name for info in infos if not blueprint.supports(info)]


def graft_everywhere(model: nn.Module, *, finished: bool = True) -> list[Receipt]:
    receipts = [
        esper.graft(model, name, "kv_cache_8bit", sample=TOKENS, ramp_steps=1)
        for name in rounded_layers(model)
    ]
    for receipt in receipts:
        if finished:
            receipt.graft.on_step()
    return receipts


def generate(model: Any, cache: Any, **options: Any) -> Tensor:
    tokens: Tensor = model.generate(
        TOKENS,
        attention_mask=torch.ones_like(TOKENS),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        past_key_values=cache,
        **options,
    )
    return tokens


def plain_cache(model: Any) -> Any:
    return DynamicCache(config=model.config)


MODELS = {"gpt2": make_gpt2, "llama": make_llama}


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("gpt2", ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]),
        (
            "llama",
            [f"model.layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in ("k", "v")],
        ),
    ],
)
def test_it_fits_the_layers_that_make_keys_and_values_and_no_others(
    model: str, layers: list[str]
) -> None:
    assert rounded_layers(MODELS[model]()) == layers


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_cache_holds_int8_and_a_quarter_of_the_bytes(make: Any) -> None:
    model = make()
    full = plain_cache(model)
    expected = generate(model, full)
    graft_everywhere(model)
    small = esper.int8_cache(model)
    generated = generate(model, small)
    assert {layer.keys.dtype for layer in small.layers} == {torch.int8}
    assert {layer.values.dtype for layer in small.layers} == {torch.int8}
    assert small.get_seq_length() == full.get_seq_length() == TOKENS.shape[1] + NEW_TOKENS - 1
    # One byte a value and one float32 peak a head, where there were four bytes a value.
    assert cache_bytes(small) / cache_bytes(full) == (HEAD_WIDTH + 4) / (4 * HEAD_WIDTH)
    agreement = (generated == expected)[:, TOKENS.shape[1] :].float().mean().item()
    assert agreement >= 0.9


def test_what_was_rounded_in_training_is_what_the_cache_gives_back() -> None:
    """GPT-2 caches its keys as they are projected, so both ways of rounding are one."""
    model = make_gpt2()
    graft_everywhere(model)
    with torch.no_grad():
        trained_with = model(TOKENS).logits
        cache = esper.int8_cache(model)
        model(TOKENS[:, :4], past_key_values=cache)
        step_by_step = model(TOKENS[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(step_by_step, trained_with[:, 4:], atol=1e-6, rtol=1e-5)


def test_turned_keys_are_rounded_as_coarsely_as_those_in_training() -> None:
    model = make_llama()
    with torch.no_grad():
        plain = model(TOKENS).logits
        graft_everywhere(model)
        in_training = model(TOKENS).logits
        in_cache = model(TOKENS, past_key_values=esper.int8_cache(model)).logits
    noise, scale = (in_training - plain).abs().max(), plain.abs().max()
    assert 0 < noise < 0.02 * scale
    assert (in_cache - plain).abs().max() < 3 * noise


def test_beams_are_reordered_with_their_peaks() -> None:
    model = make_gpt2()
    graft_everywhere(model)
    expected = generate(model, plain_cache(model), num_beams=3)
    assert torch.equal(generate(model, esper.int8_cache(model), num_beams=3), expected)


def test_only_the_layers_that_learned_it_are_held_as_int8() -> None:
    model = make_llama()
    esper.graft(model, "model.layers.1.self_attn.v_proj", "kv_cache_8bit", sample=TOKENS)
    cache = esper.int8_cache(model)
    generate(model, cache)
    dtypes = [(layer.keys.dtype, layer.values.dtype) for layer in cache.layers]
    assert dtypes == [(torch.float32, torch.float32), (torch.float32, torch.int8)]


def test_a_cache_is_cut_repeated_selected_and_emptied_like_any_other() -> None:
    states = torch.randn(2, 3, 5, 8)
    layer, plain = Int8Layer(), rounded(states)
    layer.update(states, states)
    layer.crop(-2)
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
    keys, values = layer.update(states[:, :, :1], states[:, :, :1])
    expected = torch.cat([plain[:, :, :3], plain[:, :, :1]], dim=-2)
    assert torch.equal(keys, expected)
    assert torch.equal(values, expected)
    layer.reset()
    assert tensors(layer) == []
    assert layer.get_seq_length() == 0
    assert torch.equal(layer.update(states, states)[0], plain)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    width=st.integers(1, 40),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_rounding_is_off_by_half_a_level_and_rounding_again_changes_nothing(
    dtype: torch.dtype, width: int, scale: float, seed: int
) -> None:
    values = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    x = (values * scale).to(dtype)
    codes, peaks = quantise(x)
    once = restore(codes, peaks)
    assert codes.dtype == torch.int8
    assert once.dtype == x.dtype
    assert torch.equal(once, rounded(x))
    assert torch.equal(once, rounded(once))
    allowed = peaks.double() * (0.5 / LEVELS + torch.finfo(dtype).eps)
    assert ((once.double() - x.double()).abs() <= allowed).all()


def test_the_gradient_goes_straight_through() -> None:
    model = make_gpt2()
    (receipt, *_) = graft_everywhere(model)
    y = torch.randn(2, 3, 6 * HEAD_WIDTH, requires_grad=True)
    cotangent = torch.randn_like(y)
    changed = receipt.graft(y, y)
    assert not torch.equal(changed, y)
    assert torch.equal(changed[..., : 2 * HEAD_WIDTH], y[..., : 2 * HEAD_WIDTH]), "queries"
    (gradient,) = torch.autograd.grad(changed, y, cotangent)
    assert torch.equal(gradient, cotangent)


def test_it_fades_in_from_nothing_and_is_undone_to_the_bit() -> None:
    model = make_gpt2().train()
    torch.manual_seed(5)
    before = model(TOKENS).logits
    receipts = graft_everywhere(model, finished=False)
    torch.manual_seed(5)
    assert torch.equal(model(TOKENS).logits, before)
    for receipt in receipts:
        receipt.graft.on_step()
    torch.manual_seed(5)
    assert not torch.equal(model(TOKENS).logits, before)
    assert all(receipt.undo().exact for receipt in reversed(receipts))
    torch.manual_seed(5)
    assert torch.equal(model(TOKENS).logits, before)
    with pytest.raises(ConfigurationError, match="not grafted"):
        esper.int8_cache(model)


def test_an_encoder_keeps_no_cache_and_is_refused() -> None:
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=VOCABULARY,
    )
    assert rounded_layers(BertForMaskedLM(config)) == []


def test_fused_attention_is_refused_with_the_reason() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = torch.randn(2, 5, 16)
    with pytest.raises(IncompatibleLayerError, match="one fused call that keeps no cache"):
        esper.graft(model, "self_attn", "kv_cache_8bit", sample=x)


def test_a_sliding_window_is_named_as_what_cannot_be_held() -> None:
    config = MistralConfig(**llama_settings(), sliding_window=4)
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    graft_everywhere(model)
    with pytest.raises(ConfigurationError, match="SlidingWindow"):
        esper.int8_cache(model)
