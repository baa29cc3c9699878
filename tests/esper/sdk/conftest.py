"""A tiny net that trains, a control plane over real sockets, and a state folder of its own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from esper.sdk import attaching
from esper.sdk.transport.queues import Pace
from tests.esper.sdk.tiny_training import Training
from tests.esper.sdk.transport.control_plane import ControlPlane


@pytest.fixture(autouse=True)
def _a_place_for_journals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_STATE_DIR", str(tmp_path / "state"))
    for name in ("ESPER_SERVER", "ESPER_TOKEN", "ESPER_STAGE_DIR"):
        monkeypatch.delenv(name, raising=False)
    brisk = partial(Pace, flush=0.02, least_gap=0.0, first_retry=0.02, longest_retry=0.1)
    monkeypatch.setattr(attaching, "Pace", brisk)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def training() -> Training:
    return Training()


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    plane = ControlPlane().start()
    yield plane
    plane.stop()
