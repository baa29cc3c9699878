"""What a graft that was taken out is worth: never more than nothing.

Tamiyo's verdict is one way to this end. Others have no verdict: the trainer's guard, a person, the
training script, a deadline. Without a reward these would not count in what policies learn from,
and a policy would lose nothing by grafts that are taken out again and again.
"""

from __future__ import annotations

import math
from typing import Any

from apps.adaptations.models import Adaptation
from esper.contracts import CostForecast, Verdict, codec
from esper.reward import after_undo, compute_reward


def reward_of_undo(adaptation: Adaptation) -> dict[str, Any]:
    """Fields of a graft that has been in the model and is out of it; none for other adaptations."""
    if adaptation.remedy or adaptation.graft_step is None:
        return {}
    terms = after_undo(adaptation.reward_terms or _costs(adaptation))
    return {"reward_terms": terms, "reward": sum(terms.values())}


def _costs(adaptation: Adaptation) -> dict[str, float]:
    """Of a graft that nobody has judged."""
    measured = adaptation.certificate or {}
    cost = CostForecast(
        parameters=adaptation.forecast_parameters,
        flops=0,  # not part of the reward
        memory_mib=_known(measured.get("memory_mib"), adaptation.forecast_memory_mib),
        latency_ms=_known(measured.get("latency_ms"), adaptation.forecast_latency_ms),
    )
    nothing_shown = Verdict(keep=False, reason="")
    return dict(
        compute_reward(
            nothing_shown,
            loss_level=math.nan,
            cost=cost,
            model_parameters=adaptation.run.model_parameters,
            policy=adaptation.safety_policy.safety_policy(),
        ).terms
    )


def _known(measured: Any, forecast: float | None) -> float:
    """The measured number where there is one; NaN: neither is known."""
    if measured is not None:
        number = codec.number_from_wire(measured)
        if math.isfinite(number):
            return number
    return math.nan if forecast is None else forecast
