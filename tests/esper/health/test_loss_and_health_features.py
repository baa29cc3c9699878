"""What the loss does and how layers compare, on curves whose answer is known."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts import SIGNAL_INDEX, SIGNALS, AdaptationType, LayerHistory, Signal
from esper.health import extract_features, health_scores, loss_features
from esper.health.score import layer_medians

Make = Callable[..., Any]
STEPS = np.arange(1, 2001, dtype=np.int64)


def noisy(loss: np.ndarray, share: float = 0.05) -> np.ndarray:
    return loss * np.random.default_rng(0).normal(1.0, share, len(loss))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5])
def test_the_exponent_of_a_power_law_is_found(alpha: float) -> None:
    found = loss_features(STEPS, noisy(4.0 * STEPS ** (-alpha)))

    assert found.exponent == pytest.approx(alpha, abs=0.03)
    assert found.plateau_score > 0.95 if alpha == 0 else found.plateau_score < 0.05


def test_noise_that_hides_the_trend_gives_no_plateau_score() -> None:
    found = loss_features(STEPS[:60], noisy(np.ones(60), share=0.6))

    assert math.isnan(found.plateau_score)


def test_too_few_samples_give_no_trend_but_a_level() -> None:
    found = loss_features(STEPS[:31], np.full(31, 2.0))

    assert math.isnan(found.exponent)
    assert found.level == pytest.approx(2.0)


def test_only_what_came_after_the_last_adaptation_counts() -> None:
    loss = noisy(np.where(STEPS < 1000, 4.0, 1.0))
    found = loss_features(STEPS, loss, since=1000)

    assert found.samples == 1000
    assert found.level == pytest.approx(1.0, rel=0.05)
    assert found.initial == pytest.approx(4.0, rel=0.05)
    assert found.plateau_score > 0.9


def test_losses_that_are_not_finite_are_counted_and_left_out() -> None:
    loss = noisy(np.ones(2000))
    loss[-5:] = math.nan
    found = loss_features(STEPS, loss)

    assert found.non_finite == 5
    assert found.samples == 1995
    assert found.level == pytest.approx(1.0, rel=0.05)


def test_a_jump_is_measured_in_noise() -> None:
    loss = noisy(np.ones(2000))
    loss[-3:] += 1.0

    assert loss_features(STEPS, loss).spike_score == pytest.approx(1.0 / 0.05, rel=0.2)


def test_the_newest_known_value_of_each_signal_is_taken(make_snapshot: Make) -> None:
    snapshot = make_snapshot()
    older, newest = snapshot.frames[-2].values, snapshot.frames[-1].values
    older[0, SIGNAL_INDEX[Signal.ACT_STD]] = 7.0
    newest[0, SIGNAL_INDEX[Signal.ACT_STD]] = math.nan
    newest[0, SIGNAL_INDEX[Signal.GRAD_NORM]] = 9.0
    features = extract_features(snapshot)

    assert features.value("in", Signal.ACT_STD) == 7.0
    assert features.value("in", Signal.GRAD_NORM) == 9.0
    assert math.isnan(features.value("nobody", Signal.GRAD_NORM))


def test_frames_of_other_layers_are_matched_by_name(make_snapshot: Make, make_frames: Make) -> None:
    frames = make_frames(("out", "stranger", "in"), {"out": {Signal.GRAD_NORM: 3.0}})
    features = extract_features(make_snapshot(frames=frames))

    assert features.value("out", Signal.GRAD_NORM) == 3.0
    assert math.isnan(features.value("mid", Signal.GRAD_NORM))


def test_the_outlier_among_layers_has_the_largest_z(make_snapshot: Make, make_layer: Make) -> None:
    layers = tuple(make_layer(f"l{i}") for i in range(9))
    signals = {f"l{i}": {Signal.GRAD_NORM: 1.0 + 0.1 * i} for i in range(9)}
    signals["l4"][Signal.GRAD_NORM] = 100.0
    features = extract_features(make_snapshot(layers=layers, signals=signals))

    assert int(np.nanargmax(features.z[:, SIGNAL_INDEX[Signal.GRAD_NORM]])) == 4


def test_a_signal_that_doubles_has_a_trend_of_one(make_snapshot: Make) -> None:
    snapshot = make_snapshot()
    for frame in snapshot.frames[2:]:
        frame.values[1, SIGNAL_INDEX[Signal.GRAD_NORM]] *= 2.0

    assert extract_features(snapshot).trend_of("mid", Signal.GRAD_NORM) == pytest.approx(1.0)


def test_grafts_are_read_as_remedies(make_snapshot: Make) -> None:
    snapshot = make_snapshot(history={"mid": LayerHistory(("lora", "unheard_of"))})
    features = extract_features(snapshot, {"lora": AdaptationType.ADD_EFFICIENCY})

    assert features.remedies == {"mid": frozenset({AdaptationType.ADD_EFFICIENCY})}


# --- health scores ------------------------------------------------------------------------------


def row(**signals: float) -> np.ndarray:
    values = np.full(len(SIGNALS), np.nan, dtype=np.float32)
    for name, value in signals.items():
        values[SIGNAL_INDEX[Signal(name)]] = value
    return values


HEALTHY = {
    "grad_norm": 1.0,
    "update_ratio": 1e-3,
    "act_std": 1.0,
    "dead_fraction": 0.0,
    "saturation": 0.0,
}


def scores(*rows: np.ndarray) -> np.ndarray:
    return health_scores(np.stack(rows))


def test_a_healthy_layer_scores_one_and_an_unmeasured_one_is_unknown() -> None:
    found = scores(row(**HEALTHY), row())

    assert found[0] == 1.0
    assert math.isnan(found[1])
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    "illness",
    [
        {"update_ratio": 1.0},
        {"update_ratio": 0.0},
        {"update_ratio": math.inf},
        {"dead_fraction": 0.7},
        {"grad_norm": 1e-5},
        {"grad_norm": 1e5},
        {"grad_norm": math.inf},
        {"act_std": 0.0},
        {"act_std": math.inf},
        {"saturation": 0.75},
        {"grad_norm": 0.0},
    ],
)
def test_one_broken_part_takes_more_than_half_of_the_health(illness: dict[str, float]) -> None:
    healthy = [row(**HEALTHY)] * 4
    found = scores(*healthy, row(**{**HEALTHY, **illness}))

    assert found[-1] < 0.5
    assert (found[:-1] == 1.0).all()


def test_a_gradient_of_zero_is_known_and_poor_where_all_layers_have_it() -> None:
    stopped = [row(**{**HEALTHY, "grad_norm": 0.0})] * 3
    unread = [row(**{**HEALTHY, "grad_norm": math.nan})] * 3

    assert (scores(*stopped) < 0.5).all()
    assert (scores(*unread) == 1.0).all()


def test_a_small_learning_rate_is_healthy_and_one_unchanged_layer_is_not() -> None:
    slow = row(**{**HEALTHY, "update_ratio": 1e-7})

    assert (scores(slow, slow, slow) == 1.0).all()
    assert scores(slow, slow, row(**{**HEALTHY, "update_ratio": 0.0}))[-1] < 0.5


@given(
    st.lists(
        st.lists(st.floats(width=32), min_size=len(SIGNALS), max_size=len(SIGNALS)),
        min_size=1,
        max_size=4,
    )
)
def test_health_is_within_its_range_or_unknown(rows: list[list[float]]) -> None:
    found = health_scores(np.array(rows, dtype=np.float32))

    assert (np.isnan(found) | ((found >= 0) & (found <= 1))).all()


def test_a_signal_without_a_value_changes_no_filter_of_warnings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Filters belong to all threads: one that trains would lose its warnings.
    monkeypatch.delattr(warnings, "catch_warnings")
    values = np.array([[1.0, np.nan, 2.0], [3.0, np.nan, np.inf]], dtype=np.float32)
    assert layer_medians(values).tolist() == pytest.approx([2.0, math.nan, 2.0], nan_ok=True)
