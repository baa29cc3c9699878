"""Reward: what a graft is known to have gained, minus what it costs, in shares of the loss.

0.02 is worth as much as 2 % less held-out loss. Terms:

    gain        +  the lower end of the gain's 95 % interval; nothing where no gain was shown, and
                   nothing for a graft that was taken out
    parameters  -  added parameters / the model's, above a free allowance
    time        -  forward time / the policy's limit
    memory      -  memory / the policy's limit
    not yet     -  of a graft that was kept: 70 % of what gain and costs sum up to. It is paid in
    earned         parts, one for each later look at the held-out loss, as far as the gain is still
                   there; a policy that was paid at once would learn to keep what helps for a while
    rollback    -  of a graft that was taken out; with the costs above it makes a graft and its undo
                   worth less than nothing, so no policy gains by repeating them
    forfeited   -  what a graft had earned that was kept, and then taken out

A graft at the whole of a limit has to earn 1 % of the loss for it. The ablation overrates what the
host has come to depend on, so the gain is at most what the forecast of the training loss allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from esper.contracts import CostForecast, Reward, SafetyPolicy, Verdict
from esper.reward.verdict import Look

PRICE = 0.01  # share of the loss that a cost of its whole limit is worth
FREE_PARAMETERS_RATIO = 0.05  # of the model's
FREE_PARAMETERS = 10_000  # in any model
ROLLBACK_COST = 0.005  # the smallest gain that matters
MAX_GAIN = 1.0
PAID_AT_VERDICT = 0.3  # of a net gain
LATER_LOOKS = 7  # each pays an equal part of the rest
NOT_YET = "not_yet_earned"


def compute_reward(
    verdict: Verdict,
    *,
    loss_level: float,
    held_out_level: float = math.nan,
    cost: CostForecast,
    model_parameters: int,
    policy: SafetyPolicy,
) -> Reward:
    """Terms of the reward; their sum is its total.

    Args:
        verdict: gains with their intervals, in units of the loss.
        loss_level: training loss before the graft, to make gains relative; its absolute value.
        held_out_level: held-out loss without the graft, the same; NaN: none is known.
        cost: of the graft, measured if possible; an unknown one counts as the full limit.
        model_parameters: of the host at attach.
        policy: the limits that cost is compared to.
    """
    free = max(FREE_PARAMETERS, FREE_PARAMETERS_RATIO * model_parameters)
    charged = max(0.0, cost.parameters - free) / max(1, model_parameters)
    terms = {
        "gain": _shown_gain(verdict, loss_level, held_out_level) if verdict.keep else 0.0,
        "parameters": -PRICE * min(1.0, charged),
        "time": -PRICE * _share(cost.latency_ms, policy.max_latency_ms),
        "memory": -PRICE * _share(cost.memory_mib, policy.max_memory_mib),
        "rollback": 0.0 if verdict.keep else -ROLLBACK_COST,
    }
    net = sum(terms.values())
    if net > 0:
        terms[NOT_YET] = -(1.0 - PAID_AT_VERDICT) * net
    return Reward(terms)


def after_later_looks(terms: Mapping[str, float], looks: Iterable[Look]) -> dict[str, float]:
    """The terms of a kept graft after looks that came behind the end of its test.

    Args:
        terms: as they were, after fewer looks or none.
        looks: all of them; the same looks twice pay once. An unknown gain pays nothing.
    """
    terms = dict(terms)
    owed = terms.pop(NOT_YET, 0.0)
    net = sum(terms.values())
    if owed >= 0 or net <= 0:
        return terms
    shares = [look.share for look in looks if math.isfinite(look.share)][:LATER_LOOKS]
    kept_up = sum(min(1.0, max(0.0, share) / terms["gain"]) for share in shares) / LATER_LOOKS
    left = max(owed, -(1.0 - PAID_AT_VERDICT) * net * (1.0 - kept_up))
    return {**terms, NOT_YET: left} if left < 0 else terms


def after_undo(terms: Mapping[str, float]) -> dict[str, float]:
    """The terms of a graft that is out of the model; below zero in sum, and equal when repeated.

    The costs stay, what it had earned is forfeited, and the undo has its price.
    """
    terms = {name: value for name, value in terms.items() if name != NOT_YET}
    earned = sum(value for value in terms.values() if value > 0)
    if earned > 0:
        terms["forfeited"] = -earned
    terms["rollback"] = min(terms.get("rollback", 0.0), -ROLLBACK_COST)
    return terms


def _shown_gain(verdict: Verdict, loss_level: float, held_out_level: float) -> float:
    """The gain that the intervals prove, a share of the loss; 0: none."""
    forecast = _relative(verdict.forecast_gain, loss_level)
    interval = _relative(verdict.forecast_interval, loss_level)
    ablation = _relative(verdict.ablation_low, held_out_level)
    if math.isnan(ablation):
        shown = forecast - interval
    elif math.isnan(forecast + interval):
        shown = ablation
    else:
        shown = min(ablation, forecast + interval)
    return 0.0 if math.isnan(shown) else max(0.0, min(MAX_GAIN, shown))


def _relative(value: float, level: float) -> float:
    known = math.isfinite(value) and math.isfinite(level) and level != 0
    return value / abs(level) if known else math.nan


def _share(value: float, limit: float) -> float:
    if not math.isfinite(value) or limit <= 0:
        return 1.0
    return min(1.0, max(0.0, value) / limit)
