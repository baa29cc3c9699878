"""Real Trainers on one CPU core, with no server and no network."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ESPER_SERVER", "ESPER_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(1)
