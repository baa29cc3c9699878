"""How a session's memory is written into a checkpoint, and read from one that is not trusted.

Plain values and tensors only, so that ``torch.load(weights_only=True)`` holds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from esper.exceptions import ConfigurationError, EsperError, ReplicaError


@contextmanager
def reading_a_state() -> Iterator[None]:
    """Inside it, every error of a bad state becomes one ``ConfigurationError``."""
    try:
        yield
    except (ConfigurationError, ReplicaError):
        raise
    except (EsperError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ConfigurationError(f"this state does not fit the model: {error}") from error


def losses_to_state(losses: Iterable[tuple[int, float]]) -> dict[str, torch.Tensor]:
    """(step, loss) pairs as two columns: int64 and float64, so that not a bit is lost."""
    pairs = list(losses)
    return {
        "step": torch.tensor([step for step, _ in pairs], dtype=torch.int64, device="cpu"),
        "loss": torch.tensor([loss for _, loss in pairs], dtype=torch.float64, device="cpu"),
    }


def losses_from_state(state: dict[str, torch.Tensor]) -> list[tuple[int, float]]:
    return list(zip(state["step"].tolist(), state["loss"].tolist(), strict=True))
