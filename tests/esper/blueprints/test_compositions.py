"""Compositions: trees of blueprints that are blueprints themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import esper
from esper import blueprints
from esper.blueprints import Composition, registry
from esper.blueprints.composition import MAX_BYTES, check_document, compose, read_documents
from esper.compilation import build_kernel, open_kernel
from esper.compilation.instantiate import instantiate
from esper.contracts import GraftKind, LayerInfo, Risk, signing
from esper.exceptions import (
    BlueprintError,
    CertificateError,
    ConfigurationError,
    DuplicateBlueprintError,
    IncompatibleLayerError,
)
from esper.grafting import apply_graft, digest, rebuild, structure, trace_layers


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """What is registered here is forgotten afterwards."""
    monkeypatch.setattr(registry, "_registered", {})
    registry._by_slug.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    registry._by_slug.cache_clear()


def document(slug: str, tree: Any, **changes: Any) -> dict[str, Any]:
    texts = {"title": "A title", "idea": "An idea.", "source": "arXiv 1", "when": "Always."}
    return {"slug": slug, "id": f"BP-{slug.replace('_', '-')}", "tree": tree, **texts, **changes}


def build(*documents: dict[str, Any]) -> dict[str, blueprints.Blueprint]:
    known = {blueprint.slug: blueprint for blueprint in blueprints.catalogue()}
    return compose({entry["slug"]: check_document(entry) for entry in documents}, known)


def make_host(d_in: int = 6, d_out: int = 5) -> tuple[nn.Sequential, Tensor, LayerInfo]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(d_in, d_out)), torch.randn(3, 4, d_in)
    return model, x, trace_layers(model, lambda: model(x))[0]


def grafted(
    blueprint: blueprints.Blueprint, **config: Any
) -> tuple[nn.Sequential, Tensor, nn.ModuleDict]:
    """Put in, and then as if it had been trained."""
    model, x, info = make_host()
    receipt = apply_graft(model, info, blueprint, config=config, thorough=True)
    with torch.no_grad():
        for parameter in receipt.graft.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    members = receipt.graft.members
    assert isinstance(members, nn.ModuleDict)
    return model, x, members


# -- what they compute -------------------------------------------------------------------------


def test_in_parallel_every_member_sees_the_layers_own_output() -> None:
    tree = {"parallel": ["proj_lora_64", "proj_ia3", "mlp_gelu_2048"]}
    model, x, members = grafted(build(document("three", tree))["three"])
    y = model[0].forward(x)
    changes = [member(x, y) - y for member in members.values()]
    torch.testing.assert_close(model(x), y + sum(changes))


def test_in_sequence_the_next_member_starts_from_the_output_of_the_last() -> None:
    tree = {"sequential": ["mlp_gelu_2048", "proj_lora_64"]}
    model, x, members = grafted(build(document("pair", tree))["pair"])
    first = members["mlp_gelu_2048"](x, model[0].forward(x))
    torch.testing.assert_close(model(x), members["proj_lora_64"](first, first))
    assert 5 in next(members["proj_lora_64"].parameters()).shape


def test_an_assembly_computes_what_its_members_do_in_one_slot() -> None:
    whole = blueprints.get_blueprint("moe_top2_balanced")
    model, x, members = grafted(whole)
    apart, _, info = make_host()
    for slug in members:
        receipt = apply_graft(apart, info, blueprints.get_blueprint(slug))
        receipt.graft.load_state_dict(members[slug].state_dict())
    assert torch.equal(model(x), apart(x))
    router: Any = members["router_top2"]
    assert router._limits == (members["cap_fuse_hffn"],)
    assert router._balancers == (members["load_bal_ema"],)


def test_nodes_stand_inside_nodes_and_may_be_named() -> None:
    inner = document("inner", {"parallel": ["proj_lora_64", "proj_ia3"]})
    outer = document(
        "outer", {"sequential": [{"parallel": ["mon_act_stats", "inner"]}, "attn_std"]}
    )
    found = build(outer, inner)
    model, x, members = grafted(found["outer"])
    assert list(members) == ["part_1", "attn_std"]
    assert torch.isfinite(model(x)).all()
    leaves = [leaf.slug for leaf in found["outer"].leaves]  # type: ignore[attr-defined]
    assert leaves == ["mon_act_stats", "proj_lora_64", "proj_ia3", "attn_std"]


def test_a_part_has_its_own_settings_and_an_unknown_one_is_refused() -> None:
    _, _, info = make_host()
    whole = blueprints.get_blueprint("moe_top2_balanced")
    config = whole.config_for(info, {"router_top2": {"experts": 8}})
    assert config["router_top2"]["experts"] == 8
    assert config["expert_mlp_swiglu"] == {"hidden": 24}
    for bad in ({"router": {}}, {"router_top2": 8}, {"router_top2": {"expert": 8}}):
        with pytest.raises(ConfigurationError):
            whole.config_for(info, bad)


# -- properties of the whole -------------------------------------------------------------------


def test_facts_of_the_whole_come_from_its_parts() -> None:
    _, _, info = make_host()
    for whole in (b for b in blueprints.list_blueprints() if isinstance(b, Composition)):
        config = whole.default_config(info)
        assert whole.parameters(info, config) == sum(
            p.numel() for p in whole.build(info, config, seed=0).parameters()
        )
    whole = blueprints.get_blueprint("moe_top2_balanced")
    assert (whole.risk, whole.kind, whole.trainable) == (Risk.HIGH, GraftKind.ASSEMBLY, True)
    assert whole.conflicts >= {"router_top2", "router_moe_auxloss", "cap_fuse_hffn"}
    auxloss = document("with_loss", {"assembly": ["router_moe_auxloss", "load_bal_ema"]})
    assert "scaler" in build(auxloss)["with_loss"].scaler_refusal


def test_a_refusal_names_the_part_that_does_not_fit() -> None:
    _, _, info = make_host()
    flat = replace(info, in_shape=(3, 6), out_shape=(3, 5))
    reason = blueprints.get_blueprint("block_attn_mlp").supports(flat)
    assert reason.startswith('its part "Self-attention branch" does not fit: its input')


def test_a_layer_takes_no_part_twice() -> None:
    model, _, info = make_host()
    apply_graft(model, info, blueprints.get_blueprint("proj_lora_ia3"))
    for slug in ("proj_lora_64", "proj_ia3"):
        with pytest.raises(IncompatibleLayerError, match="conflicts with proj_lora_ia3"):
            apply_graft(model, info, blueprints.get_blueprint(slug))
    other, _, _ = make_host()
    apply_graft(other, info, blueprints.get_blueprint("proj_ia3"))
    with pytest.raises(IncompatibleLayerError, match="conflicts with proj_ia3"):
        apply_graft(other, info, blueprints.get_blueprint("proj_lora_ia3"))


def test_the_version_changes_with_the_tree_and_with_a_member(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(*members: str) -> str:
        return build(document("some", {"parallel": list(members)}))["some"].version

    first = version("proj_lora_64", "proj_ia3")
    assert first == version("proj_lora_64", "proj_ia3")
    assert first != version("proj_ia3", "proj_lora_64")
    monkeypatch.setitem(vars(blueprints.get_blueprint("proj_ia3")), "version", "0" * 16)
    assert first != version("proj_lora_64", "proj_ia3")


# -- the whole way -----------------------------------------------------------------------------


@pytest.mark.parametrize("slug", ["moe_top2_balanced", "block_attn_mlp", "proj_lora_ia3"])
def test_it_goes_the_way_of_any_blueprint(slug: str) -> None:
    model, x, info = make_host()
    before, expected = digest(model), model(x)
    private = signing.generate_private_key()
    bundle = build_kernel(info, slug, private_key=private)
    _, spec, _ = open_kernel(bundle.files, bundle.digest, signing.public_key(private))
    receipt = apply_graft(
        model,
        info,
        blueprints.get_blueprint(slug),
        config=spec.config,
        graft=instantiate(spec, info),
    )
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        for parameter in receipt.graft.parameters():
            parameter.add_(torch.randn(parameter.shape))
    again, _, _ = make_host()
    rebuild(again, json.loads(json.dumps(structure(model))))
    again.load_state_dict(model.state_dict())
    exported = esper.export(model.eval())
    for copied in (again.eval(), exported):
        assert torch.equal(copied(x), model(x))
    assert receipt.undo().digest == before


TREES = st.recursive(
    st.sampled_from(["proj_lora_64", "proj_ia3", "mlp_gelu_2048", "attn_std", "mon_act_stats"]),
    lambda inner: st.builds(
        lambda way, members: {way: members},
        st.sampled_from(["parallel", "sequential"]),
        st.lists(inner, min_size=2, max_size=3),
    ),
    max_leaves=6,
).filter(lambda tree: isinstance(tree, dict))


@given(tree=TREES, d_in=st.integers(4, 20), d_out=st.integers(4, 20))
@settings(max_examples=40, deadline=None)
def test_any_tree_is_refused_or_certified(tree: Any, d_in: int, d_out: int) -> None:
    try:
        whole = build(document("any_tree", tree))["any_tree"]
    except ConfigurationError:
        return
    model, x, info = make_host(d_in, d_out)
    expected, before = model(x), digest(model)
    try:
        receipt = apply_graft(model, info, whole, x=x, thorough=True)
    except CertificateError as refusal:
        failures = refusal.certificate.failures
    else:
        failures = ()
        assert receipt.certificate.passed
        assert torch.equal(model(x), expected)
        receipt.undo()
    assert digest(model) == before
    # Three sums deep, the host's gradient is one of so many terms that their order rounds it.
    assert failures in ((), ("it changes the gradients of the layer's own weights or input",))


def test_sums_three_deep_round_the_hosts_gradient_and_are_refused() -> None:
    deep: Any = {"parallel": ["proj_lora_64", "proj_ia3"]}
    for _ in range(2):
        deep = {"parallel": ["proj_lora_64", deep]}
    model, x, info = make_host(4, 4)
    before = digest(model)
    whole = build(document("deep", deep))["deep"]
    with pytest.raises(CertificateError, match="changes the gradients"):
        apply_graft(model, info, whole, x=x, thorough=True)
    assert digest(model) == before


# -- documents ---------------------------------------------------------------------------------


def refusal(*documents: dict[str, Any]) -> str:
    with pytest.raises(ConfigurationError) as error:
        build(*documents)
    return str(error.value)


LORAS = {"sequential": ["proj_lora_64", "proj_lora_64"]}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"parallel": ["proj_lora_64", "nobody"]}, "no blueprint has the slug 'nobody'"),
        ({"parallel": ["some", "proj_ia3"]}, "some → some: a cycle"),
        ({"parallel": ["attn_std", "attn_split_qk"]}, "attn_std conflicts with attn_split_qk"),
        ({"parallel": ["attn_std", {"sequential": ["proj_ia3", "attn_split_qk"]}]}, "conflicts"),
        ({"parallel": ["proj_ia3", "proj_ia3"]}, "proj_ia3 occurs twice"),
        ({"parallel": ["router_top2", "load_bal_ema"]}, "needs router_moe_auxloss or router_top2"),
        ({"assembly": ["load_bal_ema", "router_top2"]}, "before it, in an assembly"),
        ({"assembly": ["proj_ia3", "proj_lora_64"]}, "an assembly needs a router"),
        ({"parallel": ["proj_ia3"]}, "takes 2 to 16 members"),
        ({"parallel": "proj_ia3"}, "takes 2 to 16 members"),
        ({"sideways": ["proj_ia3", "attn_std"]}, "a node is one of"),
        ({"parallel": [], "sequential": []}, "a node is one of"),
        ({"parallel": ["proj_ia3", 7]}, "some → part_2: a node is one of"),
        ("proj_ia3", "a node is one of"),
        (None, "a node is one of"),
        ({"sequential": [LORAS] * 9}, "18 parts in total; at most 16"),
        (
            {"parallel": ["attn_std", {"parallel": ["proj_ia3", {"parallel": ["mon_act_stats",
            {"parallel": ["proj_lora_64", {"parallel": ["x", "y"]}]}]}]}]},
            "deeper than 4 levels",
        ),
    ],
)  # fmt: skip
def test_a_bad_tree_is_refused_and_says_where(tree: Any, words: str) -> None:
    message = refusal(document("some", tree))
    assert message.startswith("composition some")
    assert words in message


def test_a_cycle_over_several_documents_names_the_way() -> None:
    message = refusal(
        document("first", {"parallel": ["second", "proj_ia3"]}),
        document("second", {"sequential": ["attn_std", {"parallel": ["first", "proj_lora_64"]}]}),
    )
    assert "first → second → part_2 → first: a cycle" in message


def test_names_that_double_at_each_level_are_bounded() -> None:
    doubling = [document("level_0", LORAS)] + [
        document(f"level_{n}", {"sequential": [f"level_{n - 1}"] * 2}) for n in range(1, 40)
    ]
    assert "deeper" in refusal(*doubling) or "in all" in refusal(*doubling)


@pytest.mark.parametrize(
    "changes",
    [
        {"slug": "Bad Slug"},
        {"slug": "../../etc"},
        {"slug": 3},
        {"id": "LoRA"},
        {"id": "BP-" + "A" * 80},
        {"title": ""},
        {"title": "bell \x07"},
        {"idea": "x" * 501},
        {"source": None},
        {"unknown": 1},
    ],
)
def test_a_document_of_another_form_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        check_document({**document("some", LORAS), **changes})
    assert check_document(document("some", LORAS))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"slug": NaN}',
        b'{"slug": "some", "slug": "some"}',
        b"[" * 100_000,
        b'"' + b"x" * MAX_BYTES + b'"',
    ],
)
def test_a_malicious_file_is_refused_by_its_path(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "some.json").write_bytes(raw)
    with pytest.raises(ConfigurationError, match=r"some\.json"):
        read_documents(tmp_path)


def test_a_file_must_be_named_as_its_slug(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps(document("some", LORAS)))
    with pytest.raises(ConfigurationError, match=r"must be named some\.json"):
        read_documents(tmp_path)


# -- where they come from ----------------------------------------------------------------------


def test_a_folder_of_compositions_is_read(own_registry: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "zz_mine.json").write_text(json.dumps(document("zz_mine", LORAS)))
    (tmp_path / "aa_mine.json").write_text(
        json.dumps(document("aa_mine", {"parallel": ["zz_mine", "proj_ia3"]}))
    )
    own_registry.setenv("ESPER_COMPOSITIONS", str(tmp_path))
    registry._by_slug.cache_clear()
    slugs = [blueprint.slug for blueprint in blueprints.list_blueprints()]
    assert slugs == sorted(slugs)
    assert slugs[0] == "aa_mine"
    assert blueprints.get_blueprint("BP-zz-mine").slug == "zz_mine"


@pytest.mark.parametrize("taken", ["proj_ia3", "moe_top2_balanced"])
def test_a_slug_that_is_taken_is_refused(
    taken: str, own_registry: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entry = document(taken, LORAS, id="BP-MINE")
    with pytest.raises(DuplicateBlueprintError):
        blueprints.register(entry)
    (tmp_path / f"{taken}.json").write_text(json.dumps(entry))
    own_registry.setenv("ESPER_COMPOSITIONS", str(tmp_path))
    registry._by_slug.cache_clear()
    with pytest.raises(DuplicateBlueprintError):
        blueprints.list_blueprints()


def test_a_folder_that_is_not_there_is_a_sentence(
    own_registry: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own_registry.setenv("ESPER_COMPOSITIONS", str(tmp_path / "nowhere"))
    registry._by_slug.cache_clear()
    with pytest.raises(ConfigurationError, match="not a folder"):
        blueprints.list_blueprints()


@pytest.mark.usefixtures("own_registry")
def test_what_is_registered_is_found_and_grafted() -> None:
    new = blueprints.register(document("mine", LORAS))
    assert blueprints.get_blueprint("mine") is new
    assert new in blueprints.list_blueprints()
    model = nn.Sequential(nn.Linear(6, 5))
    receipt = esper.graft(model, "0", "mine", proj_lora_64_2={"rank": 1})
    assert receipt.config["proj_lora_64_2"]["rank"] == 1
    with pytest.raises(BlueprintError):
        blueprints.register(document("mine", LORAS, id="BP-OTHER"))
    with pytest.raises(DuplicateBlueprintError):
        blueprints.register(document("another", LORAS, id="BP-PROJ-IA3"))
    with pytest.raises(ConfigurationError):
        blueprints.register({"slug": "mine"})
