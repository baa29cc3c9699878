"""The end of probation: what is kept, what is taken out, and what it was worth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.contracts import CostForecast, GraftKind, SafetyPolicy, Verdict
from esper.reward import (
    Judgement,
    Look,
    LossWindow,
    after_later_looks,
    after_undo,
    compute_reward,
    forecast_loss,
    judge,
)
from esper.reward.sequence import trend_at_every_look

POLICY = SafetyPolicy()  # warm-up 100, cap 600, 20 looks
BORN = 1000
PARALLEL = GraftKind.PARALLEL
LOOK_STEPS = 25
AGES = range(125, 601, LOOK_STEPS)


def curve(steps: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """A run that goes on by itself: falls with step^-0.2, 3 % noise."""
    return 4.0 * steps**-0.2 * np.random.default_rng(seed).normal(1.0, 0.03, len(steps))


def windows(change: float = 1.0, length: int = 150) -> tuple[LossWindow, LossWindow]:
    """Before, and after with the loss times ``change``."""
    steps = np.arange(1, BORN + length + 1, dtype=np.int64)
    loss = curve(steps, seed=1)
    loss[BORN:] *= change
    return LossWindow(steps, loss).split(BORN)


def looks(share: float, until: int, *, noise: float = 0.002, slope: float = 0.0) -> list[Look]:
    """Every 25 steps; the gain is ``share`` of the loss at the start and moves by ``slope``."""
    rng = np.random.default_rng(1)
    ages = np.arange(LOOK_STEPS, until + 1, LOOK_STEPS)
    gains = share + slope * ages + noise * rng.standard_normal(len(ages))
    return [Look(BORN + int(a), 2.0 * float(g), 2.0) for a, g in zip(ages, gains, strict=True)]


def judged(change: float = 1.0, *, length: int = 600, **options: Any) -> Judgement:
    before, after = windows(change, length)
    options = {"graft_step": BORN, "policy": POLICY, "kind": PARALLEL, **options}
    return judge(before, after, **options)


def settled(change: float = 1.0, **options: Any) -> Verdict:
    found = judged(change, **options).verdict
    assert found is not None
    return found


def first_verdict(share: float, **options: float) -> Verdict:
    """Asked at every look, as a run does."""
    for length in range(LOOK_STEPS, 601, LOOK_STEPS):
        found = judged(length=length, looks=looks(share, length, **options)).verdict
        if found is not None:
            return found
    raise AssertionError("there is a verdict at the cap")


def test_a_shown_gain_is_kept_long_before_the_cap() -> None:
    found = first_verdict(0.03)

    assert found.keep
    assert 100 < found.steps_observed <= 300
    assert found.ablation_low > 0.005 * 2.0
    assert found.ablation_low < found.ablation_gain < found.ablation_high


def test_a_small_gain_takes_more_looks_than_a_large_one() -> None:
    small, large = first_verdict(0.008), first_verdict(0.05)

    assert small.keep
    assert large.keep
    assert small.steps_observed > large.steps_observed


def test_harm_takes_a_graft_out_before_the_cap() -> None:
    found = first_verdict(-0.03)

    assert not found.keep
    assert found.steps_observed < 600
    assert "Without it" in found.reason


def test_a_newborn_that_is_worse_but_gains_gets_its_time() -> None:
    """Its line reaches +1.6 % at the cap; the same start without a slope is taken out early."""
    found = first_verdict(-0.02, slope=6e-5, noise=0.001)
    flat = first_verdict(-0.02, noise=0.001)

    assert found.keep
    assert found.steps_observed > 450
    assert not flat.keep
    assert flat.steps_observed < 300


def test_a_gain_that_goes_away_is_not_kept() -> None:
    found = settled(looks=looks(0.05, 600, slope=-9e-5, noise=0.001))
    assert not found.keep
    assert "gone" in found.reason


@pytest.mark.parametrize("share", [0.0, 1e-6, 0.003])
def test_what_is_below_the_smallest_gain_that_matters_is_never_kept(share: float) -> None:
    found = first_verdict(share, noise=1e-7)

    assert not found.keep
    assert found.steps_observed == 600


def test_noise_of_an_ablation_without_a_graft_keeps_nothing() -> None:
    """Runs are asked at each look; their loss goes on as before."""
    rng = np.random.default_rng(0)
    kept = 0
    for _ in range(12):
        noise = [Look(BORN + age, 1e-6 * float(rng.standard_normal()), 2.0) for age in AGES]
        found = [judged(length=age, looks=noise[: place + 1]) for place, age in enumerate(AGES)]
        kept += any(entry.verdict is not None and entry.verdict.keep for entry in found)

    assert kept == 0


def test_looks_during_the_warm_up_do_not_count() -> None:
    early = [Look(BORN + age, 1.0, 2.0) for age in range(5, 101, 5)]

    assert judged(length=130, looks=early).test.looks == 0


def test_a_loss_that_falls_by_itself_is_not_the_grafts_credit() -> None:
    found = settled(1.0)

    assert abs(found.forecast_gain) <= found.forecast_interval
    assert found.forecast_gain < 0.1 * curve(np.array([BORN]))[0]
    assert not found.keep


def test_without_held_out_losses_only_a_large_gain_of_the_training_loss_keeps() -> None:
    assert settled(0.85).keep
    assert not settled(0.99).keep


def test_a_graft_that_the_host_does_not_use_is_rolled_back_even_when_the_loss_fell() -> None:
    found = settled(0.85, looks=looks(0.0, 600))

    assert not found.keep
    assert "held-out" in found.reason or "No gain" in found.reason


def test_a_graft_that_the_host_came_to_need_is_rolled_back_when_the_loss_is_worse() -> None:
    found = settled(1.06, looks=looks(0.2, 600))  # harm by itself begins at 5 % + the interval

    assert not found.keep
    assert "depends" in found.reason
    assert not settled(1.15, looks=looks(0.2, 600)).keep


def test_a_harmful_graft_is_rolled_back_for_every_kind() -> None:
    for kind in GraftKind:
        assert not settled(1.5, length=150, kind=kind, looks=looks(0.1, 150)).keep


def test_an_observing_graft_is_kept_without_any_gain() -> None:
    assert settled(1.0, length=150, kind=GraftKind.OBSERVE).keep


def test_what_changes_only_gradients_is_not_judged_by_ablation() -> None:
    assert settled(0.95, kind=GraftKind.WRAP, looks=looks(0.0, 600)).keep
    assert settled(1.0, serves_loss=False, looks=looks(-0.1, 600)).keep


def test_a_cheaper_layer_is_kept_though_it_can_gain_nothing() -> None:
    for found in (
        settled(1.0, kind=GraftKind.REPLACE, looks=looks(0.0, 600)),
        settled(1.0, kind=GraftKind.REPLACE, looks=looks(-0.005, 600)),
        settled(1.0, kind=GraftKind.REPLACE),
    ):
        assert found.keep
        assert "cheaper" in found.reason
        assert "1% of the loss" in found.reason


def test_a_cheaper_layer_that_costs_too_much_of_the_loss_is_rolled_back() -> None:
    found = settled(1.0, kind=GraftKind.REPLACE, looks=looks(-0.02, 600))
    assert not found.keep
    assert "of the loss" in found.reason
    slower = settled(1.06, kind=GraftKind.REPLACE, looks=looks(0.0, 600))
    # By itself harm begins at 5 % beyond the interval, which is 4 % here.
    assert not slower.keep
    assert "above its forecast" in slower.reason


def test_a_cheaper_layer_of_a_young_run_is_judged_by_ablation_alone() -> None:
    before, after = windows(length=600)
    young = LossWindow(before.steps[-2:], before.loss[-2:])
    options: dict[str, Any] = {"graft_step": BORN, "policy": POLICY, "kind": GraftKind.REPLACE}
    for measured, keep in ((looks(0.0, 600), True), (looks(-0.5, 600), False), ([], False)):
        found = judge(young, after, looks=measured, **options).verdict
        assert found is not None
        assert found.keep is keep


def test_no_data_at_the_deadline_is_never_success() -> None:
    found = settled(0.5, length=40, looks=looks(0.5, 40), deadline_reached=True)

    assert not found.keep
    assert "No data" in found.reason


def test_a_graft_without_forecast_and_ablation_is_rolled_back() -> None:
    _, after = windows(0.5, 600)
    found = judge(LossWindow(), after, graft_step=BORN, policy=POLICY, kind=PARALLEL).verdict

    assert found is not None
    assert not found.keep
    assert math.isnan(found.forecast_gain)


def test_a_graft_with_a_non_finite_loss_is_rolled_back_at_once() -> None:
    before, after = windows(1.0, 120)
    after.loss[-1] = math.nan
    found = judge(before, after, graft_step=BORN, policy=POLICY, kind=PARALLEL).verdict

    assert found is not None
    assert not found.keep


def test_a_test_that_runs_says_how_far_it_is() -> None:
    found = judged(length=250, looks=looks(0.004, 250))

    assert found.verdict is None
    assert (found.test.steps, found.test.most_steps, found.test.looks) == (250, 600, 6)
    assert found.test.gain_low < found.test.gain < found.test.gain_high
    assert str(found.test).startswith("step 250 of at most 600 of its test; gain +0.")
    assert "6 looks; kept above +0.5%, out below 0%" in str(found.test)


def test_the_interval_holds_at_every_look_of_most_runs() -> None:
    """Nominal 95 %, for drifting gains whose noise is correlated as in real runs (r = 0.3)."""
    rng = np.random.default_rng(3)
    steps, missed = np.arange(20, dtype=np.int64) * LOOK_STEPS, 0
    for run in range(200):
        noise = rng.standard_normal(20)
        for t in range(1, 20):
            noise[t] = 0.3 * noise[t - 1] + math.sqrt(1 - 0.3**2) * noise[t]
        gain = 0.2 * (run % 2) * np.arange(20)
        found = [trend_at_every_look(steps[:n], (gain + noise)[:n]).interval for n in range(4, 21)]
        missed += any(
            not i.low <= gain[:n].mean() <= i.high for n, i in zip(range(4, 21), found, strict=True)
        )

    assert missed <= 0.08 * 200


def clean_run(kind: str, rng: np.random.Generator, length: int) -> np.ndarray:
    """A training curve of one of five shapes, with noise of 1 to 30 %."""
    steps = np.arange(1, length + 1)
    noise = rng.choice([0.01, 0.03, 0.1, 0.3]) * rng.standard_normal(length)
    if kind == "correlated":
        for t in range(1, length):
            noise[t] = 0.9 * noise[t - 1] + math.sqrt(1 - 0.9**2) * noise[t]
    power = steps ** -rng.uniform(0.05, 0.6)
    shapes = {"power": 4 * power, "floor": 1 + 3 * power, "flat": np.ones(length)}
    shapes["correlated"] = 4 * power
    shapes["exponential"] = 0.5 + 2 * np.exp(-steps / rng.uniform(200, 900))
    return shapes[kind] * np.exp(noise)


@pytest.mark.parametrize(
    ("ends", "fewest"), [(1250, 0.90), (1600, 0.90), (2200, 0.90), (3000, 0.85)]
)
def test_the_forecast_interval_covers_clean_runs_as_it_says(ends: int, fewest: float) -> None:
    """Nominal 95 %, of all shapes together; little is known of three times the steps so far."""
    rng = np.random.default_rng(1)
    steps = np.arange(1, ends + 1, dtype=np.int64)
    held = []
    for kind in ("power", "floor", "flat", "correlated", "exponential"):
        for _ in range(40):
            loss = clean_run(kind, rng, ends)
            found = forecast_loss(steps[:BORN], loss[:BORN], steps[1100:])
            held.append(abs(found.level - loss[1100:].mean()) <= found.interval)

    assert fewest <= np.mean(held) <= 0.98


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


@settings(deadline=None)  # a busy machine is slow
@given(
    losses=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=60),
    gains=st.lists(st.floats(), max_size=8),
    deadline=st.booleans(),
)
def test_any_losses_get_a_verdict_or_none_and_harmful_grafts_are_never_kept(
    losses: list[float], gains: list[float], deadline: bool
) -> None:
    steps = BORN + 140 + np.arange(len(losses), dtype=np.int64)
    after = LossWindow(steps, np.array(losses, dtype=float))
    found = judge(
        windows()[0],
        after,
        graft_step=BORN,
        policy=POLICY,
        kind=PARALLEL,
        looks=[Look(BORN + 120 + n, gain, 2.0) for n, gain in enumerate(gains)],
        deadline_reached=deadline,
    ).verdict

    if deadline:
        assert found is not None
    if found is not None and not np.isfinite(losses).all():
        assert not found.keep


# --- reward -------------------------------------------------------------------------------------

COST = CostForecast(parameters=30_000, flops=2_000, memory_mib=102.4, latency_ms=1.0)
TINY = CostForecast(parameters=200, flops=400, memory_mib=0.01, latency_ms=0.01)


def reward_of(
    verdict: Verdict, cost: CostForecast = COST, model_parameters: int = 100_000
) -> dict[str, float]:
    return compute_reward(
        verdict,
        loss_level=2.0,
        held_out_level=4.0,
        cost=cost,
        model_parameters=model_parameters,
        policy=POLICY,
    ).terms


def shown(low: float, **changes: float) -> Verdict:
    """Kept, with a gain of at least ``low``; it agrees with its forecast."""
    values = {"forecast_gain": 0.2, "forecast_interval": 0.1, **changes}
    return Verdict(
        True, "", ablation_gain=2 * low, ablation_low=low, ablation_high=3 * low, **values
    )


def test_the_terms_are_those_computed_by_hand() -> None:
    assert reward_of(shown(0.1)) == pytest.approx(
        {
            "gain": 0.1 / 4.0,
            "parameters": -0.01 * 20_000 / 100_000,
            "time": -0.01 * 1.0 / POLICY.max_latency_ms,
            "memory": -0.01 * 102.4 / POLICY.max_memory_mib,
            "rollback": 0.0,
            "not_yet_earned": pytest.approx(-0.7 * sum(list(reward_of(shown(0.1)).values())[:5])),
        }
    )


def test_a_gain_counts_no_more_than_the_forecast_allows() -> None:
    dependent = shown(2.0, forecast_gain=0.0, forecast_interval=0.1)  # ablation says 50 %

    assert reward_of(dependent)["gain"] == pytest.approx(0.1 / 2.0)


def test_nothing_is_paid_where_nothing_is_shown() -> None:
    for verdict in (Verdict(True, ""), shown(-0.1), Verdict(True, "", ablation_gain=1.0)):
        assert reward_of(verdict)["gain"] == 0.0


def test_without_a_held_out_loss_the_lower_end_of_the_forecast_counts() -> None:
    verdict = Verdict(True, "", forecast_gain=0.3, forecast_interval=0.1)

    assert reward_of(verdict)["gain"] == pytest.approx(0.2 / 2.0)


def test_a_tiny_graft_with_a_shown_gain_has_a_positive_reward_in_any_host() -> None:
    for parameters in (300, 100_000, 10**9):
        terms = reward_of(shown(0.03), TINY, parameters)
        assert terms["parameters"] == 0.0
        assert sum(terms.values()) > 0.3 * 0.007


@given(
    gains=st.lists(st.floats(), min_size=5, max_size=5),
    parameters=st.integers(0, 10**12),
    memory=st.floats(),
    latency=st.floats(),
)
def test_a_graft_and_its_undo_never_gain(
    gains: list[float], parameters: int, memory: float, latency: float
) -> None:
    """Whatever is reported: kept first, its rollback forfeits the gain that was paid."""
    verdict = Verdict(False, "", *gains)
    terms = reward_of(verdict, CostForecast(parameters, 0, memory, latency))

    assert sum(terms.values()) < 0


def later(*shares: float) -> list[Look]:
    return [Look(BORN + 900 + 300 * n, 4.0 * share, 4.0) for n, share in enumerate(shares)]


def test_the_rest_of_a_reward_is_paid_as_far_as_the_gain_is_still_there() -> None:
    terms = reward_of(shown(0.1))
    gain, net = terms["gain"], sum(terms.values()) / 0.3
    for shares, paid in {
        (): 0.3,
        (gain,): 0.4,
        (gain, 3 * gain): 0.5,
        (gain, gain / 2): 0.45,
        (gain, -gain, math.nan, 0.0): 0.4,
        (gain,) * 7: 1.0,
        (gain,) * 20: 1.0,
    }.items():
        now = after_later_looks(terms, later(*shares))
        assert sum(now.values()) == pytest.approx(paid * net), shares
        assert after_later_looks(now, later(*shares)) == pytest.approx(now)
        # Old looks may be thinned at the server: what was paid stays paid.
        assert sum(after_later_looks(now, ()).values()) == pytest.approx(paid * net)


def test_a_graft_that_costs_more_than_it_gains_is_charged_at_once() -> None:
    terms = reward_of(shown(0.001), CostForecast(10**9, 0, 1e9, 1e9))
    assert sum(terms.values()) < 0
    assert after_later_looks(terms, later(0.5, 0.5)) == terms


@given(
    low=st.floats(0, 1e3),
    shares=st.lists(st.floats(), max_size=9),
    parameters=st.integers(0, 10**9),
)
def test_whatever_was_paid_is_lost_with_the_graft(
    low: float, shares: list[float], parameters: int
) -> None:
    terms = reward_of(shown(low), CostForecast(parameters, 0, 1.0, 0.1))
    whole = sum(value for name, value in terms.items() if name != "not_yet_earned")
    earned = after_later_looks(terms, later(*shares))
    assert sum(terms.values()) - 1e-9 <= sum(earned.values()) <= max(whole, 0.3 * whole) + 1e-9
    gone = after_undo(earned)
    assert sum(gone.values()) < 0
    assert after_undo(gone) == gone


def test_an_unknown_latency_is_charged_in_full() -> None:
    unknown = CostForecast(1_000, 2_000, 1.0, math.nan)

    assert reward_of(shown(0.1), unknown)["time"] == pytest.approx(-0.01)


@given(low=st.floats(), level=st.floats(), held_out=st.floats(), latency=st.floats())
def test_a_reward_is_always_a_number(
    low: float, level: float, held_out: float, latency: float
) -> None:
    reward = compute_reward(
        Verdict(True, "", ablation_low=low),
        loss_level=level,
        held_out_level=held_out,
        cost=CostForecast(10, 10, 1.0, latency),
        model_parameters=0,
        policy=POLICY,
    )

    assert math.isfinite(reward.total)
