"""The fixture of tests with real trainers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from esper.sdk import attaching
from esper.sdk.transport.queues import Pace
from tests.apps.stage import Stage
from tests.apps.trainers.lives import Lives


@pytest.fixture
def lives(
    stage: Stage, live_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Lives]:
    monkeypatch.setenv("ESPER_STATE_DIR", str(tmp_path))
    brisk = partial(Pace, flush=0.02, least_gap=0.0, first_retry=0.02, longest_retry=0.1)
    monkeypatch.setattr(attaching, "Pace", brisk)
    lives = Lives(stage, live_server.url)
    yield lives
    for session in lives.sessions:
        session.close()
