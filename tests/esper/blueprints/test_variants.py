"""Variants of blueprints: a closed grammar, in which nothing changes the output at first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from esper.blueprints import Blueprint, Composition, get_blueprint, list_blueprints
from esper.contracts import LayerInfo
from esper.contracts.spans import span
from esper.contracts.variants import FACTORS, key_of, variants_of, why_no_variant
from esper.exceptions import ConfigurationError, IncompatibleLayerError
from esper.grafting import apply_graft, trace_layers

TUNED = tuple(entry for entry in list_blueprints() if entry.tunes)


def layers(width: int) -> list[LayerInfo]:
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5))
    first, *_, last = trace_layers(model, lambda: model(torch.randn(3, width)))
    image = nn.Sequential(nn.Conv2d(width, 8, 3))
    (convolution,) = trace_layers(image, lambda: image(torch.randn(2, width, 6, 6)))
    return [first, span(first, last), convolution]


def test_blueprints_spans_and_compositions_are_tuned() -> None:
    assert any(entry.spans for entry in TUNED)
    assert any(isinstance(entry, Composition) for entry in TUNED)
    assert any(len(entry.tunes) > 1 for entry in TUNED)


@pytest.mark.parametrize("entry", TUNED, ids=lambda entry: entry.slug)
@given(width=st.integers(2, 80), place=st.integers(0, 2), number=st.integers(0, 10_000))
def test_a_variant_is_a_valid_size_or_refused(
    entry: Blueprint, width: int, place: int, number: int
) -> None:
    known = variants_of(entry.tunes)
    factors = known[number % len(known)]
    assert not why_no_variant(factors, entry.tunes)
    layer = layers(width)[place]
    try:
        config = entry.varied(layer, factors)
    except (ConfigurationError, IncompatibleLayerError):
        return  # above the largest that is allowed, the usual size, or a layer it does not fit
    assert config == entry.config_for(layer, config)
    assert config != entry.config_for(layer)
    assert entry.forecast(layer, config).parameters >= 0
    told = entry.factors_of(layer, config)
    assert all(told[name] == 1.0 for name in set(entry.tunes) - factors.keys())


@given(
    factors=st.dictionaries(
        st.sampled_from(["rank", "alpha", "hidden", "", "rank.alpha"]),
        st.one_of(st.sampled_from(FACTORS), st.floats(), st.booleans()),
        max_size=4,
    )
)
def test_what_the_grammar_does_not_have_is_refused(factors: dict[str, Any]) -> None:
    entry = get_blueprint("proj_lora_64")
    valid = factors in variants_of(entry.tunes) and not any(
        isinstance(factor, bool) for factor in factors.values()
    )
    assert bool(why_no_variant(factors, entry.tunes)) is not valid
    if not valid:
        with pytest.raises(ConfigurationError):
            entry.varied(layers(32)[0], factors)


def test_every_variant_is_listed_once() -> None:
    for entry in TUNED:
        keys = [key_of(factors) for factors in variants_of(entry.tunes)]
        assert len(set(keys)) == len(keys)


def test_a_grafted_variant_changes_nothing_at_first_and_has_its_size() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32)), torch.randn(4, 32)
    (layer,) = trace_layers(model, lambda: model(x))
    entry = get_blueprint("proj_lora_64")
    before = model(x)
    receipt = apply_graft(model, layer, entry, config=entry.varied(layer, {"rank": 2.0}))
    assert torch.equal(model(x), before)
    assert receipt.graft.down.shape[0] == 2 * entry.default_config(layer)["rank"]


def test_a_part_of_a_composition_has_its_own_factor() -> None:
    (layer, *_) = layers(64)
    entry = get_blueprint("proj_lora_ia3")
    config = entry.varied(layer, {"proj_lora_64.rank": 0.5})
    usual = entry.default_config(layer)
    assert config["proj_lora_64"]["rank"] * 2 == usual["proj_lora_64"]["rank"]
