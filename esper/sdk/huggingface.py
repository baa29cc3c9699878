"""The published import path of the transformers callback; its code is in ``frameworks``."""

from esper.sdk.frameworks.huggingface import EsperCallback

__all__ = ["EsperCallback"]
