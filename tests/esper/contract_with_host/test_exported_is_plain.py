"""D6: an exported model is of the original class, with the original names, or says why not."""

from __future__ import annotations

import copy
import io
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper import blueprints
from tests.esper.contract_with_host.saved_models import (
    GRAFTS,
    MODELS,
    Run,
    computed,
    fresh,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
MERGED = [
    ("mlp", "0", "proj_lora_64"),
    ("mlp", "1", "proj_ia3"),
    ("convolutions", "3", "proj_lora_64"),
    ("convolutions", "5", "proj_ia3"),
    ("convolutions", "1", "proj_ia3"),
    ("lstm", "out", "proj_lora_64"),
    ("gpt2", "transformer.h.0.mlp.c_fc", "proj_lora_64"),
    ("gpt2", "transformer.h.1.attn.c_attn", "proj_ia3"),
    ("mlp", "0", "clamp_grad_norm"),
    ("mlp", "0", "mon_act_stats"),
]
KEPT = [
    ("mlp", "0", "mlp_gelu_2048", "weights of this Linear"),
    ("mlp", "1", "ln_rms", "weights of this LayerNorm"),
    ("convolutions", "3", "mlp_swiglu_4096", "weights of this Conv2d"),
    ("gpt2", "lm_head", "proj_lora_64", "another layer shares"),
    ("lstm", "lstm", "expert_mlp_1d", "weights of this LSTM"),
]


class OnePlus(nn.Module):
    """Gemma's way to scale: a merge into its weight would be another function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.5, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class OnePlusRMSNorm(OnePlus):
    pass


class TimesRMSNorm(OnePlus):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


def hooks_of(model: nn.Module) -> list[Any]:
    kinds = [name for name in vars(model) if name.endswith("_hooks")]
    return [h for module in model.modules() for k in kinds for h in getattr(module, k).values()]


@pytest.mark.parametrize("ended", [False, True], ids=["attached", "closed"])
@pytest.mark.parametrize(("kind", "layer", "slug"), MERGED)
def test_where_all_merges_the_plain_class_loads_it(
    kind: str, layer: str, slug: str, ended: bool
) -> None:
    run = Run(kind)
    run.graft(layer, slug)
    if ended:
        run.session.close()
    plain = esper.export(run.model)
    model = fresh(kind)

    assert type(plain) is type(model)
    assert list(plain.state_dict()) == list(model.state_dict())
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    assert hooks_of(plain) == hooks_of(model) == []
    model.load_state_dict(plain.state_dict())
    assert torch.equal(computed(model, kind), computed(plain, kind))
    expected = computed(run.model, kind)
    scale = expected.abs().max().item()
    assert (computed(plain, kind) - expected).abs().max().item() <= 1e-5 * scale
    run.session.close()


@pytest.mark.parametrize(("kind", "layer", "slug", "reason"), KEPT)
def test_where_a_graft_cannot_be_merged_it_is_said_which_and_why(
    kind: str,
    layer: str,
    slug: str,
    reason: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = Run(kind)
    run.graft(layer, slug)
    with caplog.at_level(logging.WARNING, logger="esper"):
        plain = esper.export(run.model, tmp_path)

    [line] = [r.getMessage() for r in caplog.records if "grafted.load" in r.getMessage()]
    assert line.startswith(f"{layer}: ")
    assert slug in line
    assert reason in line
    assert reason in repr(plain)
    assert type(plain) is type(run.model)
    assert torch.equal(computed(plain, kind), computed(run.model, kind))
    with pytest.raises(RuntimeError, match="load_with_grafted_load"):
        fresh(kind).load_state_dict(plain.state_dict())
    loaded = load_from(tmp_path, kind)
    assert torch.equal(computed(loaded, kind), computed(plain, kind))
    assert reason in repr(loaded)
    run.session.close()


def load_from(folder: Path, kind: str) -> nn.Module:
    namespace: dict[str, Any] = {"__name__": "grafted"}
    exec((folder / "grafted.py").read_text(), namespace)
    model: nn.Module = namespace["load"](fresh(kind), folder)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_only_the_layers_that_keep_a_graft_are_renamed(kind: str) -> None:
    run = Run(kind)
    for layer, slug in GRAFTS[kind]:
        run.graft(layer, slug)
    plain = esper.export(run.model)
    kept = [
        layer
        for layer, slug in GRAFTS[kind]
        if slug not in ("clamp_grad_norm", "mon_act_stats")
        and (not blueprints.get_blueprint(slug).mergeable or layer == "lm_head")
    ]

    here = {name for name in plain.state_dict() if "load_with_grafted_load" not in name}
    expected = {
        name.replace(f"{layer}.", f"{layer}.host.", 1)
        for name in fresh(kind).state_dict()
        for layer in [next((k for k in kept if name.startswith(f"{k}.")), "-")]
    }
    assert here == expected
    assert torch.allclose(computed(plain, kind), computed(run.model, kind), atol=1e-5)
    run.session.close()


def test_a_copy_is_pickled_without_esper() -> None:
    run = Run("mlp")
    run.graft("0", "proj_lora_64")
    kept = io.BytesIO()
    torch.save(copy.deepcopy(esper.export(run.model)), kept)

    assert b"esper" not in kept.getvalue()
    assert "esper" in sys.modules
    run.session.close()


@pytest.mark.parametrize(("norm", "merged"), [(OnePlusRMSNorm, False), (TimesRMSNorm, True)])
def test_a_gain_is_merged_only_into_a_norm_that_scales_by_its_weight(
    norm: type[OnePlus], merged: bool
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), norm(), nn.Linear(16, 4)), torch.randn(4, 16)
    receipt = esper.graft(model, "1", "proj_ia3", sample=x)
    gain = next(iter(receipt.graft.parameters()))
    with torch.no_grad():
        gain.copy_(torch.linspace(0.5, 2, 16))
    plain = esper.export(model)

    torch.testing.assert_close(plain(x), model(x))
    assert (type(plain[1]) is norm) is merged  # type: ignore[index]
