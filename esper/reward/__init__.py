"""The result of an adaptation: its gain, its verdict, and its reward for the policy."""

from esper.reward.forecast import LossForecast, forecast_loss
from esper.reward.terms import compute_reward
from esper.reward.verdict import LossWindow, judge

__all__ = ["LossForecast", "LossWindow", "compute_reward", "forecast_loss", "judge"]
