"""The catalogue is found, named and described."""

from __future__ import annotations

import hashlib
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from esper import blueprints
from esper.blueprints import catalog
from esper.blueprints.catalog import proj_ia3, proj_lora_64
from esper.blueprints.registry import discover
from esper.contracts import Risk
from esper.exceptions import (
    DuplicateBlueprintError,
    IncompatibleLayerError,
    UnknownBlueprintError,
)
from esper.grafting import apply_graft, trace_layers

RISKS = {
    "attn_std": Risk.MEDIUM,
    "attn_split_qk": Risk.MEDIUM,
    "cap_fuse_hffn": Risk.HIGH,
    "clamp_grad_norm": Risk.LOW,
    "expert_mlp_1d": Risk.MEDIUM,
    "expert_mlp_swiglu": Risk.MEDIUM,
    "kv_cache_8bit": Risk.HIGH,
    "ln_rms": Risk.HIGH,
    "load_bal_ema": Risk.HIGH,
    "mlp_gelu_2048": Risk.MEDIUM,
    "mlp_swiglu_4096": Risk.MEDIUM,
    "mon_act_stats": Risk.NONE,
    "proj_ia3": Risk.LOW,
    "proj_lora_64": Risk.LOW,
    "router_moe_auxloss": Risk.MEDIUM,
    "router_top2": Risk.MEDIUM,
}


def test_every_file_of_the_catalogue_is_a_blueprint_in_alphabetical_order() -> None:
    files = sorted(path.stem for path in Path(catalog.__path__[0]).glob("[a-z]*.py"))
    assert [blueprint.slug for blueprint in blueprints.catalogue()] == files
    assert {b.slug: b.risk for b in blueprints.list_blueprints()}.items() >= RISKS.items()


def test_a_blueprint_is_found_by_slug_and_by_id() -> None:
    for blueprint in blueprints.list_blueprints():
        assert blueprints.get_blueprint(blueprint.slug) is blueprint
        assert blueprints.get_blueprint(blueprint.id) is blueprint
    with pytest.raises(UnknownBlueprintError):
        blueprints.get_blueprint("")


@pytest.mark.parametrize("blueprint", blueprints.list_blueprints(), ids=lambda b: b.slug)
def test_a_blueprint_tells_a_person_what_it_is(blueprint: blueprints.Blueprint) -> None:
    assert re.fullmatch(r"BP(-[A-Za-z0-9]+)+", blueprint.id)
    for text in (blueprint.idea, blueprint.when):
        assert text.endswith(".")
        assert len(text.split()) > 5
    assert "arXiv" in blueprint.source
    assert blueprint.slug not in blueprint.conflicts


def test_the_version_is_the_digest_of_the_file() -> None:
    path = Path(catalog.__path__[0]) / "proj_ia3.py"
    version = blueprints.get_blueprint("proj_ia3").version
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(version)
    assert len(version) == 16


@pytest.mark.parametrize(
    ("slug", "base"),
    [
        ("attn_std", "attention"),
        ("mlp_swiglu_4096", "feedforward"),
        ("expert_mlp_1d", "feedforward"),
    ],
)
def test_the_version_changes_with_the_shared_code_that_builds_the_graft(
    slug: str, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blueprint = type(blueprints.get_blueprint(slug))
    before = blueprint().version
    read = Path.read_bytes
    changed = {f"{base}.py": b"# changed"}
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + changed.get(path.name, b""))
    assert blueprint().version != before


def test_blueprints_that_conflict_both_say_so() -> None:
    known = {blueprint.slug: blueprint for blueprint in blueprints.catalogue()}
    for slug, blueprint in known.items():
        assert all(slug in known[other].conflicts for other in blueprint.conflicts)


def test_no_catalogue_file_knows_another() -> None:
    for blueprint in blueprints.catalogue():
        source = (Path(catalog.__path__[0]) / f"{blueprint.slug}.py").read_text()
        assert "blueprints.catalog" not in source


def test_one_slug_twice_is_an_error() -> None:
    with pytest.raises(DuplicateBlueprintError, match="twice"):
        discover([proj_ia3, proj_lora_64, proj_ia3])


def test_a_slug_that_is_not_its_files_name_is_an_error() -> None:
    spec = importlib.util.spec_from_file_location("another_name", proj_ia3.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(DuplicateBlueprintError, match="another_name"):
        discover([module])


def test_a_file_without_a_blueprint_is_an_error() -> None:
    with pytest.raises(DuplicateBlueprintError):
        discover([ModuleType("empty")])


def test_several_ranks_take_no_new_weights_but_may_be_watched() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    info = trace_layers(model, lambda: model(x))[0]
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(IncompatibleLayerError, match="several ranks"):
            apply_graft(model, info, blueprints.get_blueprint("proj_lora_64"))
        apply_graft(model, info, blueprints.get_blueprint("mon_act_stats"))
    finally:
        torch.distributed.destroy_process_group()
