"""D6 in PEFT: grafts beside its adapters are saved, loaded and kept through a merge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.exceptions import EsperError
from esper.grafting.slot import slots
from esper.sdk import framework_loads
from tests.esper.contract_with_host.saved_models import Run, computed, fresh

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = {"mlp": ["0", "3"], "gpt2": ["c_attn", "c_fc"]}
BASE = "base_model.model"
GRAFTED = [
    ("mlp", f"{BASE}.0.base_layer", "mlp_gelu_2048"),
    ("mlp", f"{BASE}.1", "ln_rms"),
    ("mlp", f"{BASE}.3.base_layer", "proj_lora_64"),
    ("gpt2", f"{BASE}.transformer.h.0.mlp.c_fc.base_layer", "mlp_gelu_2048"),
    ("gpt2", f"{BASE}.transformer.h.1.mlp.c_proj", "proj_ia3"),
]


def adapted(kind: str) -> Any:
    config = peft.LoraConfig(r=2, target_modules=TARGETS[kind], init_lora_weights=False)
    return peft.get_peft_model(fresh(kind), config)


class Adapted(Run):
    def __init__(self, kind: str) -> None:
        self.kind, self.steps = kind, 0
        self.model: nn.Module = adapted(kind)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-2)
        self.session = esper.attach(self.model, self.optimizer)
        self.train(2)


@pytest.mark.parametrize(("kind", "layer", "slug"), GRAFTED)
def test_an_adapter_is_saved_and_loaded_with_the_grafts_beside_it(
    tmp_path: Path, kind: str, layer: str, slug: str
) -> None:
    run = Adapted(kind)
    run.graft(layer, slug)
    model: Any = run.model
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(fresh(kind), tmp_path)

    assert torch.equal(computed(loaded, kind), computed(model, kind))
    assert (tmp_path / framework_loads.GRAFTS_FILE).exists()
    run.session.close()


@pytest.mark.parametrize(("kind", "layer", "slug"), GRAFTED)
def test_a_merge_keeps_the_grafts(kind: str, layer: str, slug: str) -> None:
    run = Adapted(kind)
    run.graft(layer, slug)
    expected = computed(run.model, kind)
    model: Any = run.model
    merged = model.merge_and_unload()

    assert [s for _, _, slot in slots(merged) for s in slot.grafts()] == [slug]
    torch.testing.assert_close(computed(merged, kind), expected, atol=1e-5, rtol=1e-5)
    plain = esper.export(merged)
    torch.testing.assert_close(computed(plain, kind), expected, atol=1e-5, rtol=1e-5)
    run.session.close()


def test_the_best_adapter_is_older_than_the_graft_or_has_it(tmp_path: Path) -> None:
    run = Adapted("mlp")
    model: Any = run.model
    outputs = {}
    for name in ("before", "with"):
        if name == "with":
            run.graft(f"{BASE}.0.base_layer", "mlp_gelu_2048")
        model.save_pretrained(tmp_path / name)
        outputs[name] = computed(model, "mlp")
    for name in ("before", "with", "before", "with"):
        run.train(2)
        model.load_adapter(tmp_path / name, "default")  # as a Trainer does at its end
        assert torch.equal(computed(model, "mlp"), outputs[name]), name
    run.session.close()


def test_a_state_of_the_whole_model_and_an_adapter_without_grafts(tmp_path: Path) -> None:
    run = Adapted("mlp")
    model: Any = run.model
    best, expected = copy.deepcopy(model.state_dict()), computed(model, "mlp")
    run.graft(f"{BASE}.0.base_layer", "mlp_gelu_2048")
    model.load_state_dict(best)
    assert torch.equal(computed(model, "mlp"), expected)
    model.save_pretrained(tmp_path)

    assert not (tmp_path / framework_loads.GRAFTS_FILE).exists()
    loaded = peft.PeftModel.from_pretrained(fresh("mlp"), tmp_path)
    assert torch.equal(computed(loaded, "mlp"), expected)
    run.session.close()


def test_the_layers_of_an_adapter_take_no_graft() -> None:
    """A merge multiplies their weights, and a graft beside them would be lost without a word."""
    run = Adapted("mlp")
    for part in ("lora_A", "lora_B"):
        with pytest.raises(EsperError, match="PEFT adapter"):
            run.session.graft(f"{BASE}.0.{part}.default", "mlp_gelu_2048")
    run.session.close()
