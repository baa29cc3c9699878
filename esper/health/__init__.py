"""From raw tensors to health frames, and from frames to features.

Only the sampler needs torch. It is loaded on first use, so that processes that decide or serve
pages work without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esper.health.features import Features, LossFeatures, extract_features, loss_features
from esper.health.score import health_scores

if TYPE_CHECKING:
    from esper.health.sampler import HealthSampler

__all__ = [
    "Features",
    "HealthSampler",
    "LossFeatures",
    "extract_features",
    "health_scores",
    "loss_features",
]


def __getattr__(name: str) -> Any:
    if name == "HealthSampler":
        from esper.health.sampler import HealthSampler

        return HealthSampler
    raise AttributeError(f"module 'esper.health' has no attribute {name!r}")
