"""The published import path for loops that Accelerate prepares; the code is in ``frameworks``."""

from esper.sdk.frameworks.accelerate import attach, step

__all__ = ["attach", "step"]
