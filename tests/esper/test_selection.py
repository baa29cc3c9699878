"""Selection: the best candidate, a "why not" for every other blueprint, limits that hold."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.blueprints import get_blueprint
from esper.contracts import (
    AdaptationType,
    Experience,
    GraftKind,
    LayerHistory,
    LayerInfo,
    Risk,
    RunSnapshot,
    SafetyPolicy,
    Selection,
    Signal,
)
from esper.contracts.variants import Variant
from esper.exceptions import ConfigurationError, UnknownBlueprintError
from esper.health import extract_features
from esper.selection import BlueprintSelector

POLICY = SafetyPolicy()
EFFICIENCY, FFN = AdaptationType.ADD_EFFICIENCY, AdaptationType.ADD_FFN
Make = Callable[..., Any]


def why_not(selection: Selection) -> dict[str, str]:
    return {line.blueprint: line.reason for line in selection.why_not}


@pytest.fixture
def layer(make_layer: Make) -> LayerInfo:
    found: LayerInfo = make_layer("mid")
    return found


@pytest.fixture
def snapshot(make_snapshot: Make) -> RunSnapshot:
    found: RunSnapshot = make_snapshot()
    return found


def test_every_blueprint_but_the_best_has_a_reason(
    catalog: tuple[Any, ...], layer: LayerInfo, snapshot: RunSnapshot
) -> None:
    selection = BlueprintSelector(catalog).select(layer, EFFICIENCY, snapshot, POLICY)

    assert selection.best is not None
    assert set(why_not(selection)) == {b.slug for b in catalog} - {selection.best.blueprint}
    assert all(why_not(selection).values())


def test_the_score_is_the_sum_of_its_terms(
    catalog: tuple[Any, ...], layer: LayerInfo, snapshot: RunSnapshot
) -> None:
    best = BlueprintSelector(catalog).select(layer, FFN, snapshot, POLICY).best

    assert best is not None
    assert best.score == pytest.approx(sum(best.terms.values()))


@given(seed=st.integers(0, 1000))
def test_the_order_of_the_catalogue_has_no_influence(
    seed: int, catalog: tuple[Any, ...], make_layer: Make, make_snapshot: Make
) -> None:
    shuffled = list(catalog)
    random.Random(seed).shuffle(shuffled)
    layer, snapshot = make_layer("mid"), make_snapshot()

    for kind in AdaptationType:
        first = BlueprintSelector(catalog).select(layer, kind, snapshot, POLICY)
        assert BlueprintSelector(shuffled).select(layer, kind, snapshot, POLICY) == first


def test_equal_candidates_are_ordered_by_their_slug(
    plain_blueprint: Make, layer: LayerInfo, snapshot: RunSnapshot
) -> None:
    twins = [plain_blueprint(slug, EFFICIENCY) for slug in ("twin_b", "twin_a")]
    best = BlueprintSelector(twins).select(layer, EFFICIENCY, snapshot, POLICY).best

    assert best is not None
    assert best.blueprint == "twin_a"


def test_a_size_that_fits_is_chosen_in_place_of_one_that_is_too_large(
    plain_blueprint: Make, layer: LayerInfo, snapshot: RunSnapshot
) -> None:
    heavy = plain_blueprint("heavy", EFFICIENCY, memory_mib=1.0, size_count=5)
    policy = SafetyPolicy(max_memory_mib=3.0)
    best = BlueprintSelector([heavy]).select(layer, EFFICIENCY, snapshot, policy).best

    assert best is not None
    assert best.forecast.memory_mib <= 3.0


@pytest.mark.parametrize(
    ("changes", "limits", "words"),
    [
        ({"memory_mib": 5.0}, {"max_memory_mb": 1.0}, "MiB"),
        ({"latency_ms": 5.0}, {"max_latency_ms": 1.0}, "ms"),
        ({"parameters": 1_000_000}, {}, "parameters"),
        ({"memory_mib": math.nan}, {}, "unknown"),
    ],
)
def test_what_breaks_a_limit_at_every_size_says_which(
    changes: dict[str, Any],
    limits: dict[str, float],
    words: str,
    plain_blueprint: Make,
    layer: LayerInfo,
    snapshot: RunSnapshot,
) -> None:
    selector = BlueprintSelector([plain_blueprint("big", EFFICIENCY, **changes)])
    selection = selector.select(layer, EFFICIENCY, snapshot, POLICY, extra_limits=limits)

    assert selection.best is None
    assert words in why_not(selection)["big"]


def test_unknown_limits_are_an_error(
    catalog: tuple[Any, ...], layer: LayerInfo, snapshot: RunSnapshot
) -> None:
    with pytest.raises(ConfigurationError):
        BlueprintSelector(catalog).select(
            layer, FFN, snapshot, POLICY, extra_limits={"max_fun": 1.0}
        )


def test_conflicts_hold_in_both_directions(
    catalog: tuple[Any, ...], layer: LayerInfo, snapshot: RunSnapshot
) -> None:
    # Only "ffn" declares the conflict.
    for carried, other in (("ffn", "ffn_gated"), ("ffn_gated", "ffn")):
        taken = replace(snapshot, history={"mid": LayerHistory(grafts=(carried,))})
        reasons = why_not(BlueprintSelector(catalog).select(layer, FFN, taken, POLICY))
        assert "has it already" in reasons[carried]
        assert f"conflicts with {carried}" in reasons[other]


def test_what_a_blueprint_requires_must_sit_on_the_layer(
    plain_blueprint: Make, layer: LayerInfo, snapshot: RunSnapshot
) -> None:
    part = plain_blueprint("part", FFN, requires=frozenset({"router", "other_router"}))
    selector = BlueprintSelector([part, plain_blueprint("router", EFFICIENCY)])
    refused = selector.select(layer, FFN, snapshot, POLICY)
    assert why_not(refused)["part"] == "It needs other_router or router on the layer first."
    carrying = replace(snapshot, history={"mid": LayerHistory(grafts=("router",))})
    best = selector.select(layer, FFN, carrying, POLICY).best
    assert best is not None
    assert best.blueprint == "part"


def test_of_equals_the_one_with_fewer_parts_is_taken_until_experience_says_otherwise(
    plain_blueprint: Make, layer: LayerInfo, snapshot: RunSnapshot
) -> None:
    whole = plain_blueprint("a_whole", FFN, parts=3)
    selector = BlueprintSelector([whole, plain_blueprint("b_single", FFN)])
    best = selector.select(layer, FFN, snapshot, POLICY).best
    assert best is not None
    assert best.blueprint == "b_single"
    lived = replace(snapshot, experience={"a_whole": Experience(kept=9, mean_reward=1.0)})
    best = selector.select(layer, FFN, lived, POLICY).best
    assert best is not None
    assert best.blueprint == "a_whole"


def test_disabled_and_unfit_blueprints_say_so(
    catalog: tuple[Any, ...], make_layer: Make, snapshot: RunSnapshot
) -> None:
    selector = BlueprintSelector(catalog)
    disabled = replace(snapshot, disabled_blueprints=frozenset({"lora", "gain"}))
    table = make_layer("mid", kind="Embedding")
    closed = make_layer("mid", graftable=False, reason="Its hook never fires.")

    assert "curator" in why_not(selector.select(table, EFFICIENCY, disabled, POLICY))["lora"]
    assert "table" in why_not(selector.select(table, EFFICIENCY, snapshot, POLICY))["lora"]
    assert (
        why_not(selector.select(closed, EFFICIENCY, snapshot, POLICY))["lora"]
        == "Its hook never fires."
    )


def test_experience_changes_the_choice(
    catalog: tuple[Any, ...], layer: LayerInfo, snapshot: RunSnapshot
) -> None:
    selector = BlueprintSelector(catalog)
    for winner, loser in (("lora", "gain"), ("gain", "lora")):
        experience = {winner: Experience(30, 0, 0.5), loser: Experience(0, 30, -0.5)}
        taught = replace(snapshot, experience=experience)
        best = selector.select(layer, EFFICIENCY, taught, POLICY).best
        assert best is not None
        assert best.blueprint == winner


def test_an_unstable_layer_is_limited_and_a_stable_one_is_measured(
    catalog: tuple[Any, ...], layer: LayerInfo, make_snapshot: Make
) -> None:
    selector = BlueprintSelector(catalog)
    chosen = {}
    for ratio in (1e-3, 1.0):
        snapshot = make_snapshot(signals={"mid": {Signal.UPDATE_RATIO: ratio}})
        best = selector.select(
            layer,
            AdaptationType.ADD_DIAGNOSTIC,
            snapshot,
            POLICY,
            features=extract_features(snapshot),
        ).best
        assert best is not None
        chosen[ratio] = best.blueprint

    assert chosen == {1e-3: "watch", 1.0: "clamp"}


def test_a_missing_latency_is_bounded_only_while_the_bound_is_within_the_limit(
    plain_blueprint: Make, layer: LayerInfo, snapshot: RunSnapshot
) -> None:
    small = plain_blueprint("small", EFFICIENCY, latency_ms=math.nan, size_count=1)
    selector = BlueprintSelector([small])
    bounded = selector.select(layer, EFFICIENCY, snapshot, POLICY).best
    strict = SafetyPolicy(max_latency_ms=0.1)
    unknown = selector.select(layer, EFFICIENCY, snapshot, strict).best

    assert bounded is not None
    assert 0.2 <= bounded.forecast.latency_ms <= POLICY.max_latency_ms
    assert unknown is not None
    assert math.isnan(unknown.forecast.latency_ms)


def test_costs_are_asked_for_once_per_shape(
    plain_blueprint: Make, make_layer: Make, snapshot: RunSnapshot
) -> None:
    asked: list[str] = []

    class Counting(plain_blueprint):  # type: ignore[misc,valid-type]
        def forecast(self, layer: LayerInfo, config: dict[str, Any]) -> Any:
            asked.append(layer.name)
            return super().forecast(layer, config)

    selector = BlueprintSelector([Counting("one", EFFICIENCY, size_count=4)])
    for name in ("a", "b", "a"):
        selector.select(make_layer(name), EFFICIENCY, snapshot, POLICY)

    assert asked == ["a"] * 4


def test_cases_are_counted_over_the_category(catalog: tuple[Any, ...]) -> None:
    selector = BlueprintSelector(catalog)
    experience = {"ffn": Experience(3, 1), "attention": Experience(2, 0), "lora": Experience(9, 9)}

    assert selector.category_cases("ffn_gated", experience) == 6
    with pytest.raises(UnknownBlueprintError):
        selector.category_cases("nobody", experience)


def test_riskier_kinds_score_lower_when_all_else_is_equal(
    plain_blueprint: Make, layer: LayerInfo, snapshot: RunSnapshot
) -> None:
    mild = plain_blueprint("z_mild", EFFICIENCY)
    risky = plain_blueprint("a_risky", EFFICIENCY, risk=Risk.MEDIUM)
    replacing = plain_blueprint("a_replacing", EFFICIENCY, kind=GraftKind.REPLACE)
    selection = BlueprintSelector([mild, risky, replacing]).select(
        layer, EFFICIENCY, snapshot, POLICY
    )

    assert selection.best is not None
    assert selection.best.blueprint == "z_mild"
    assert "risk" in why_not(selection)["a_risky"]
    assert "stability" in why_not(selection)["a_replacing"]


def test_every_field_but_name_and_place_tells_layers_apart() -> None:
    """Two layers may share a cost table only when nothing that costs depends on differs."""
    from dataclasses import fields

    from esper.contracts import LayerInfo
    from esper.selection import _shape_key

    layer = LayerInfo("a", "Conv2d", (1, 4, 8, 8), (1, 4, 8, 8), "float32", 148, graftable=True)
    ignored = {"name", "order", "feeds", "compiled"}  # compiling is a pause, and no cost of a size
    assert len(_shape_key(layer)) == len({field.name for field in fields(LayerInfo)} - ignored)


# --- variants -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gain", "chosen"), [(0.2, True), (-0.2, False), (math.nan, None)], ids=str
)
def test_an_admitted_variant_is_a_further_size_and_its_trials_count(
    layer: LayerInfo, snapshot: RunSnapshot, gain: float, chosen: bool | None
) -> None:
    lora = get_blueprint("proj_lora_64")
    variant = Variant("var_1", lora.slug, {"rank": 0.25, "alpha": 2.0}, gain, 20)
    with_it = replace(snapshot, variants=(variant,))
    selector = BlueprintSelector([lora])
    best = selector.select(layer, EFFICIENCY, with_it, POLICY).best
    assert best is not None
    if chosen is not None:
        assert (best.variant == "var_1") is chosen
    if best.variant:
        assert best.config == lora.varied(layer, variant.factors)
        assert best.terms["trials"] > 0
    assert best.score == pytest.approx(sum(best.terms.values()))
    # What is not admitted is in no snapshot, and the tables of before do not bring it back.
    without = selector.select(layer, EFFICIENCY, snapshot, POLICY).best
    assert without is not None
    assert without.variant == ""
    assert without.config in lora.sizes(layer)


def test_a_variant_that_a_layer_does_not_have_is_no_size(
    layer: LayerInfo, snapshot: RunSnapshot
) -> None:
    lora = get_blueprint("proj_lora_64")
    unknown = (Variant("var_1", lora.slug, {"rank": 7.0}, 1.0, 20), Variant("var_2", "other"))
    best = BlueprintSelector([lora]).select(
        layer, EFFICIENCY, replace(snapshot, variants=unknown), POLICY
    )
    assert best == BlueprintSelector([lora]).select(layer, EFFICIENCY, snapshot, POLICY)
