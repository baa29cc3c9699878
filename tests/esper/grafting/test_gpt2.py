"""A real model from another library: transposed layers, a tied head, keyword inputs."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from esper import blueprints
from esper.grafting import Surroundings, apply_graft, digest, trace_layers
from tests.esper.tiny_models import IN_LAYERS, meet_requirements

IDS = torch.arange(24).reshape(2, 12) % 20


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("slug", IN_LAYERS)
def test_every_layer_of_gpt2_is_grafted_or_refused_and_all_undone(slug: str) -> None:
    model = make_gpt2().eval()
    optimizer = torch.optim.AdamW(model.parameters())
    infos = trace_layers(model, lambda: model(input_ids=IDS))
    before, expected = digest(model), model(input_ids=IDS).logits
    blueprint = blueprints.get_blueprint(slug)
    surroundings, receipts = Surroundings([optimizer]), []
    for info in infos:
        if not blueprint.supports(info):
            receipts += meet_requirements(model, info, blueprint, surroundings)
            receipts.append(apply_graft(model, info, blueprint, surroundings=surroundings))
    norms = sum(info.kind == "LayerNorm" for info in infos)
    few = {"ln_rms": norms, "kv_cache_8bit": 2}  # one for each block's attention
    assert len(receipts) >= few.get(slug, 9)
    assert torch.equal(model(input_ids=IDS).logits, expected)
    assert model.lm_head.weight is model.transformer.wte.weight
    model(input_ids=IDS, labels=IDS).loss.backward()
    for receipt in receipts:
        assert all(p.grad is not None for p in receipt.graft.parameters())
    undone = receipts[0].undo()
    assert undone.digest == before
    assert len(undone.discarded) == len(receipts) - 1
    assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("slug", ["attn_std", "attn_split_qk"])
def test_attention_beside_a_causal_layer_sees_no_future(slug: str) -> None:
    model = make_gpt2().eval()
    infos = {i.name: i for i in trace_layers(model, lambda: model(input_ids=IDS))}
    receipt = apply_graft(model, infos["transformer.h.0.mlp.c_fc"], blueprints.get_blueprint(slug))
    with torch.no_grad():
        receipt.graft.weight_out.normal_()
        whole = model(input_ids=IDS).logits[:, :6]
        start = model(input_ids=IDS[:, :6]).logits
    torch.testing.assert_close(whole, start)
