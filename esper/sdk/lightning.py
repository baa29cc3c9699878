"""The published import path of the Lightning callback; its code is in ``frameworks``."""

from esper.sdk.frameworks.lightning import EsperCallback

__all__ = ["EsperCallback"]
