"""Reward: gain per cost, in shares, so that runs of any scale can be compared.

    gain        +  relative gain: the smaller of ablation and forecast where both are known
    rent        -  added parameters / max(model's parameters, floor)
    latency     -  latency / the policy's limit
    memory      -  memory / the policy's limit
    risk        -  class of risk
    rollback    -  a rollback loses the gain and costs extra, so graft/undo cycles never gain

The floor keeps grafts affordable in a host of a hundred parameters.
"""

from __future__ import annotations

import math

from esper.contracts import CostForecast, Reward, Risk, SafetyPolicy, Verdict, risk_rank

GAIN_WEIGHT = 5.0  # 10 % less loss gives half a point
MAX_GAIN = 1.0
RENT_WEIGHT = 0.5
RENT_FLOOR_PARAMETERS = 10_000
LATENCY_WEIGHT = 0.1
MEMORY_WEIGHT = 0.1
RISK_WEIGHT = 0.02
ROLLBACK_COST = 0.2


def compute_reward(
    verdict: Verdict,
    *,
    loss_level: float,
    cost: CostForecast,
    model_parameters: int,
    risk: Risk,
    policy: SafetyPolicy,
) -> Reward:
    """Terms of the reward; their sum is its total.

    Args:
        verdict: gains in units of the loss.
        loss_level: loss before the graft, to make gains relative; its absolute value is used.
        cost: of the graft, measured if possible; an unknown latency counts as the full limit.
        model_parameters: of the host at attach.
        risk: of the blueprint.
        policy: the limits that cost is compared to.
    """
    rolled_back = not verdict.keep
    return Reward(
        terms={
            "gain": 0.0 if rolled_back else _relative_gain(verdict, loss_level),
            "rent": -RENT_WEIGHT
            * min(1.0, cost.parameters / max(model_parameters, RENT_FLOOR_PARAMETERS)),
            "latency": -LATENCY_WEIGHT * _share(cost.latency_ms, policy.max_latency_ms),
            "memory": -MEMORY_WEIGHT * _share(cost.memory_mib, policy.max_memory_mib),
            "risk": -RISK_WEIGHT * risk_rank(risk),
            "rollback": -ROLLBACK_COST if rolled_back else 0.0,
        }
    )


def _relative_gain(verdict: Verdict, loss_level: float) -> float:
    gains = [g for g in (verdict.ablation_gain, verdict.forecast_gain) if math.isfinite(g)]
    if not gains or not math.isfinite(loss_level) or loss_level == 0:
        return 0.0
    relative = GAIN_WEIGHT * min(gains) / abs(loss_level)
    return max(-MAX_GAIN, min(MAX_GAIN, relative))


def _share(value: float, limit: float) -> float:
    if not math.isfinite(value) or limit <= 0:
        return 1.0
    return min(1.0, max(0.0, value) / limit)
