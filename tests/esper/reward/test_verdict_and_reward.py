"""The end of probation: what is kept, what is taken out, and what it was worth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts import CostForecast, GraftKind, Risk, SafetyPolicy, Verdict
from esper.reward import LossWindow, compute_reward, forecast_loss, judge

POLICY = SafetyPolicy()  # maturity 50, window 150
BORN = 1000
PARALLEL = GraftKind.PARALLEL


def curve(steps: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """A run that goes on by itself: falls with step^-0.2, 3 % noise."""
    return 4.0 * steps**-0.2 * np.random.default_rng(seed).normal(1.0, 0.03, len(steps))


def windows(change: float = 1.0, length: int = 150) -> tuple[LossWindow, LossWindow]:
    """Before, and after with the loss times ``change``."""
    steps = np.arange(1, BORN + length + 1, dtype=np.int64)
    loss = curve(steps)
    loss[BORN:] *= change
    return LossWindow(steps, loss).split(BORN)


def verdict(
    change: float = 1.0,
    *,
    length: int = 150,
    kind: GraftKind = PARALLEL,
    ablation_gain: float = math.nan,
    deadline_reached: bool = False,
) -> Verdict | None:
    before, after = windows(change, length)
    return judge(
        before,
        after,
        graft_step=BORN,
        policy=POLICY,
        kind=kind,
        ablation_gain=ablation_gain,
        deadline_reached=deadline_reached,
    )


def settled(change: float = 1.0, **options: Any) -> Verdict:
    found = verdict(change, **options)
    assert found is not None
    return found


def test_there_is_no_verdict_before_the_window_is_full() -> None:
    assert verdict(length=149) is None
    assert verdict(length=150) is not None


def test_a_loss_that_falls_by_itself_is_not_the_grafts_credit() -> None:
    found = settled(1.0)

    assert abs(found.forecast_gain) <= found.forecast_interval
    assert found.forecast_gain < 0.1 * curve(np.array([BORN]))[0]


def test_a_better_loss_and_a_useful_ablation_are_kept() -> None:
    found = settled(0.85, ablation_gain=0.05)

    assert found.keep
    assert found.forecast_gain > found.forecast_interval
    assert found.steps_observed == 150


def test_a_graft_that_the_host_does_not_use_is_rolled_back_even_when_the_loss_fell() -> None:
    found = settled(0.85, ablation_gain=0.0)

    assert not found.keep
    assert "held-out" in found.reason


def test_a_graft_that_the_host_came_to_need_is_rolled_back_when_the_loss_is_worse() -> None:
    assert not settled(1.15, ablation_gain=0.5).keep


def test_a_harmful_graft_is_rolled_back_for_every_kind() -> None:
    for kind in GraftKind:
        assert not settled(1.5, kind=kind, ablation_gain=0.1).keep


def test_an_observing_graft_is_kept_without_any_gain() -> None:
    assert settled(1.0, kind=GraftKind.OBSERVE).keep
    assert settled(1.0, kind=GraftKind.OBSERVE, ablation_gain=0.0).keep


def test_what_changes_only_gradients_is_not_judged_by_ablation() -> None:
    assert settled(0.95, kind=GraftKind.WRAP, ablation_gain=0.0).keep


def test_a_cheaper_layer_is_kept_though_it_can_gain_nothing() -> None:
    loss = curve(np.array([BORN]))[0]
    for gain in (0.0, -0.005 * loss, math.nan):
        found = settled(1.0, kind=GraftKind.REPLACE, ablation_gain=gain)
        assert found.keep
        assert "cheaper" in found.reason
        assert "1% of the loss" in found.reason


def test_a_cheaper_layer_that_costs_too_much_of_the_loss_is_rolled_back() -> None:
    loss = curve(np.array([BORN]))[0]
    found = settled(1.0, kind=GraftKind.REPLACE, ablation_gain=-0.02 * loss)
    assert not found.keep
    assert "of held-out loss" in found.reason
    slower = settled(1.04, kind=GraftKind.REPLACE, ablation_gain=0.0)  # harm begins at 5 %
    assert not slower.keep
    assert "above its forecast" in slower.reason


def test_a_cheaper_layer_of_a_young_run_is_judged_by_ablation_alone() -> None:
    before, after = windows()
    young = LossWindow(before.steps[-2:], before.loss[-2:])
    options: dict[str, Any] = {"graft_step": BORN, "policy": POLICY, "kind": GraftKind.REPLACE}
    for gain, keep in ((0.0, True), (-1.0, False), (math.nan, False)):
        found = judge(young, after, ablation_gain=gain, **options)
        assert found is not None
        assert found.keep is keep


def test_no_data_at_the_deadline_is_never_success() -> None:
    found = settled(0.5, length=40, ablation_gain=1.0, deadline_reached=True)

    assert not found.keep
    assert "No data" in found.reason


def test_a_graft_without_forecast_and_ablation_is_rolled_back() -> None:
    _, after = windows(0.5)
    found = judge(LossWindow(), after, graft_step=BORN, policy=POLICY, kind=PARALLEL)

    assert found is not None
    assert not found.keep
    assert math.isnan(found.forecast_gain)


def test_a_graft_with_a_non_finite_loss_is_rolled_back_at_once() -> None:
    before, after = windows(1.0, 60)
    after.loss[-1] = math.nan
    found = judge(before, after, graft_step=BORN, policy=POLICY, kind=PARALLEL)

    assert found is not None
    assert not found.keep


def test_most_forecasts_of_an_unchanged_run_hold() -> None:
    steps = np.arange(1, 1151, dtype=np.int64)
    held = 0
    for seed in range(40):
        loss = curve(steps, seed=seed)
        found = forecast_loss(steps[:BORN], loss[:BORN], steps[BORN:])
        held += abs(found.level - loss[BORN:].mean()) <= found.interval

    assert held >= 34


def test_a_rising_loss_is_not_forecast_to_rise_for_ever() -> None:
    steps = np.arange(1, 201, dtype=np.int64)
    found = forecast_loss(steps, 1.0 + steps / 200, np.arange(201, 401))

    assert found.level <= 2.0


@given(
    losses=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=60),
    ablation=st.floats(),
    deadline=st.booleans(),
)
def test_any_losses_get_a_verdict_or_none_and_harmful_grafts_are_never_kept(
    losses: list[float], ablation: float, deadline: bool
) -> None:
    steps = BORN + 140 + np.arange(len(losses), dtype=np.int64)
    after = LossWindow(steps, np.array(losses, dtype=float))
    found = judge(
        windows()[0],
        after,
        graft_step=BORN,
        policy=POLICY,
        kind=PARALLEL,
        ablation_gain=ablation,
        deadline_reached=deadline,
    )

    if deadline:
        assert found is not None
    if found is not None and not np.isfinite(losses).all():
        assert not found.keep


# --- reward -------------------------------------------------------------------------------------

COST = CostForecast(parameters=1_000, flops=2_000, memory_mib=102.4, latency_ms=1.0)


def reward_of(
    verdict: Verdict, cost: CostForecast = COST, model_parameters: int = 100_000
) -> dict[str, float]:
    return compute_reward(
        verdict,
        loss_level=2.0,
        cost=cost,
        model_parameters=model_parameters,
        risk=Risk.LOW,
        policy=POLICY,
    ).terms


def test_the_terms_are_those_computed_by_hand() -> None:
    terms = reward_of(Verdict(True, "", ablation_gain=0.1, forecast_gain=0.2))

    assert terms == pytest.approx(
        {
            "gain": 5.0 * 0.1 / 2.0,
            "rent": -0.5 * 0.01,
            "latency": -0.1 * 0.1,
            "memory": -0.1 * 0.1,
            "risk": -0.02,
            "rollback": 0.0,
        }
    )


def test_a_rollback_loses_the_gain_so_that_cycles_never_gain() -> None:
    terms = reward_of(Verdict(False, "", ablation_gain=5.0, forecast_gain=5.0))

    assert terms["gain"] == 0.0
    assert sum(terms.values()) < 0


def test_a_tiny_host_pays_rent_by_the_floor() -> None:
    kept = Verdict(True, "")

    assert reward_of(kept, model_parameters=300)["rent"] == pytest.approx(-0.05)


def test_an_unknown_latency_is_charged_in_full() -> None:
    unknown = CostForecast(1_000, 2_000, 1.0, math.nan)

    assert reward_of(Verdict(True, ""), unknown)["latency"] == pytest.approx(-0.1)


@given(gain=st.floats(), level=st.floats(), latency=st.floats())
def test_a_reward_is_always_a_number(gain: float, level: float, latency: float) -> None:
    reward = compute_reward(
        Verdict(True, "", ablation_gain=gain),
        loss_level=level,
        cost=CostForecast(10, 10, 1.0, latency),
        model_parameters=0,
        risk=Risk.HIGH,
        policy=POLICY,
    )

    assert math.isfinite(reward.total)
