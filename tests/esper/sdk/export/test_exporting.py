"""An exported model is a plain one: it loads and runs where Esper is not installed."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import blueprints
from esper.exceptions import ConfigurationError, IncompatibleLayerError
from esper.grafting import slot_of
from tests.esper.tiny_models import IN_LAYERS

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.norm = nn.LayerNorm(16)
        self.wide = nn.Linear(16, 32)
        self.conv = nn.Conv1d(32, 16, 3, padding=1)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        h = torch.relu(self.wide(self.norm(self.embed(tokens))))
        h = self.conv(h.transpose(1, 2)).transpose(1, 2)
        h = h + self.attend(h, h, h, need_weights=False)[0]
        return self.head(h)
"""

WITHOUT_ESPER = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "esper":
            raise ImportError("Esper is not installed here")

sys.meta_path.insert(0, Nothing())
import torch
from net import Net
import grafted

model = grafted.load(Net(), sys.argv[1])
torch.save(model.eval()(torch.load("tokens.pt")), "output.pt")
loss = model.train()(torch.load("tokens.pt")).square().mean()
loss.backward()
assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
assert not any(name.split(".")[0] == "esper" for name in sys.modules), "Esper was imported"
"""
TOKENS = torch.arange(24).reshape(2, 12) % 11
# Parts of an assembly, and what sits on a decoder of transformers.
NEEDS_ANOTHER = ("cap_fuse_hffn", "load_bal_ema", "kv_cache_8bit")
GRAFTABLE = ("embed", "norm", "wide", "conv", "attend", "head")


def make_net() -> nn.Module:
    namespace: dict[str, type[nn.Module]] = {}
    exec(MODEL, namespace)
    torch.manual_seed(0)
    return namespace["Net"]().eval()


def disturb(model: nn.Module) -> None:
    """As if it had been trained: no graft is at its identity any more."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("alpha"):
                buffer.fill_(0.4)


def grafted_everywhere(slug: str) -> tuple[nn.Module, int]:
    model, count = make_net(), 0
    for layer in GRAFTABLE:
        try:
            esper.graft(model, layer, slug, sample=TOKENS)
            count += 1
        except IncompatibleLayerError:
            continue
    disturb(model)
    return model, count


def run_without_esper(folder: Path) -> Tensor:
    (folder / "net.py").write_text(MODEL)
    torch.save(TOKENS, folder / "tokens.pt")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ESPER, str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "output.pt")  # type: ignore[no-any-return]


@pytest.mark.parametrize("slug", IN_LAYERS)
def test_every_blueprint_is_exported_and_computes_the_same(slug: str) -> None:
    model, count = grafted_everywhere(slug)
    assert bool(count) is (slug not in NEEDS_ANOTHER)
    expected = model(TOKENS)
    plain = esper.export(model)
    if blueprints.get_blueprint(slug).mergeable:
        scale = expected.abs().max().item()
        assert (plain(TOKENS) - expected).abs().max().item() <= 1e-5 * scale
    else:
        assert torch.equal(plain(TOKENS), expected)
    assert not any(type(module).__module__.startswith("esper") for module in plain.modules())
    assert not any(module._forward_hooks for module in plain.modules())


def test_what_was_written_loads_and_trains_with_esper_uninstalled(tmp_path: Path) -> None:
    model = make_net()
    for layer, slug in [
        ("norm", "ln_rms"), ("wide", "attn_std"), ("wide", "mlp_gelu_2048"),
        ("wide", "proj_lora_64"),
        ("conv", "mlp_swiglu_4096"), ("conv", "clamp_grad_norm"), ("attend", "expert_mlp_1d"),
        ("attend", "mon_act_stats"), ("head", "proj_lora_64"), ("head", "proj_ia3"),
    ]:  # fmt: skip
        esper.graft(model, layer, slug, sample=TOKENS)
    disturb(model)
    expected = model(TOKENS)
    esper.export(model, tmp_path / "out")
    (tmp_path / "out" / "grafted.py").read_text().index("import torch")
    assert torch.equal(run_without_esper(tmp_path / "out"), expected)


def test_an_assembly_is_exported_whole(tmp_path: Path) -> None:
    model = make_net()
    for slug in ("router_top2", "expert_mlp_swiglu", "cap_fuse_hffn", "load_bal_ema"):
        esper.graft(model, "wide", slug, sample=TOKENS)
    esper.graft(model, "norm", "moe_top2_balanced", sample=TOKENS)
    disturb(model)
    expected = model(TOKENS)
    plain = esper.export(model, tmp_path / "out")
    assert torch.equal(plain(TOKENS), expected)
    assert torch.equal(run_without_esper(tmp_path / "out"), expected)


@pytest.mark.filterwarnings("ignore:.*is a no-op:UserWarning")  # "meta" holds no values
def test_it_loads_into_a_model_on_any_device(tmp_path: Path) -> None:
    model = make_net()
    for slug in ("router_top2", "expert_mlp_swiglu", "load_bal_ema"):
        esper.graft(model, "wide", slug, sample=TOKENS)
    esper.export(model, tmp_path)
    grafted = runpy.run_path(str(tmp_path / "grafted.py"))
    loaded = grafted["load"](make_net().to("meta"), tmp_path)
    assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"meta"}


def test_a_tied_weight_is_not_merged_into(tmp_path: Path) -> None:
    model = make_net()
    esper.graft(model, "head", "proj_lora_64", sample=TOKENS)
    disturb(model)
    table = model.get_parameter("embed.weight").detach().clone()
    expected = model(TOKENS)
    plain = esper.export(model)
    assert torch.equal(plain(TOKENS), expected)
    assert torch.equal(plain.get_parameter("embed.weight"), table)
    assert plain.get_submodule("head").weight is plain.get_submodule("embed").weight


def test_a_merged_model_has_the_layers_that_it_had_and_the_original_is_untouched() -> None:
    model = make_net()
    esper.graft(model, "wide", "proj_lora_64", sample=TOKENS)
    disturb(model)
    plain = esper.export(model)
    assert [name for name, _ in plain.named_modules()] == [
        name for name, _ in make_net().named_modules()
    ]
    slot = slot_of(model.get_submodule("wide"))
    assert slot is not None
    assert list(slot.grafts()) == ["proj_lora_64"]


def test_what_no_file_could_hold_is_refused() -> None:
    model = make_net()
    receipt = esper.graft(model, "wide", "mlp_gelu_2048", sample=TOKENS)
    receipt.graft.secret = object()  # type: ignore[assignment]
    with pytest.raises(ConfigurationError, match="not plain data"):
        esper.export(model)
