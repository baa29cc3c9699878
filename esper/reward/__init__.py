"""The result of an adaptation: its gain, its verdict, and its reward for the policy."""

from esper.reward.forecast import LossForecast, forecast_loss
from esper.reward.terms import LATER_LOOKS, after_later_looks, after_undo, compute_reward
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
    "LATER_LOOKS",
    "Judgement",
    "Look",
    "LossForecast",
    "LossWindow",
    "after_later_looks",
    "after_undo",
    "compute_reward",
    "forecast_loss",
    "held_out_level",
    "judge",
    "looks_of",
]
