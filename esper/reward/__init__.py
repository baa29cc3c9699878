"""The result of an adaptation: its gain, its verdict, and its reward for the policy."""

from esper.reward.forecast import LossForecast, forecast_loss
from esper.reward.terms import compute_reward
from esper.reward.verdict import (
    FORWARD_UNCHANGED,
    Judgement,
    Look,
    LossWindow,
    held_out_level,
    judge,
    looks_of,
)

__all__ = [
    "FORWARD_UNCHANGED",
    "Judgement",
    "Look",
    "LossForecast",
    "LossWindow",
    "compute_reward",
    "forecast_loss",
    "held_out_level",
    "judge",
    "looks_of",
]
