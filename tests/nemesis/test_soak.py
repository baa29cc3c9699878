"""Growth is measured after the warm-up, and a process that was started again begins anew."""

from __future__ import annotations

import os
import time
from typing import Any

from tests.nemesis.soak import CONNECTIONS, Sampler, Samples, describe_growth


def test_growth_is_that_from_the_second_quarter_to_the_last() -> None:
    samples = Samples()
    samples.readings["web, MiB"] = [50, 90, 100, 100, 105, 105, 110, 110]
    samples.readings["a process that lived too briefly, MiB"] = [1, 2, 3]
    assert samples.growth() == {"web, MiB": (100, 110)}
    assert "| web, MiB | 100 | 110 | +10.0 % |" in describe_growth(samples, 60)


class OneProcess:
    """An installation of this process alone, with three connections."""

    def pids(self) -> dict[str, int]:
        return {"web": os.getpid(), "gone": 2**22 + 1}

    def rows(self, query: str) -> list[tuple[int]]:
        return [(3,)]


def test_memory_files_and_connections_are_sampled() -> None:
    installation: Any = OneProcess()
    sampler = Sampler(installation, period=0.001)
    sampler.start()
    deadline = time.monotonic() + 300
    while not sampler.samples.readings[CONNECTIONS] and time.monotonic() < deadline:
        time.sleep(0.001)
    sampler.stop()
    readings = sampler.samples.readings
    assert readings[CONNECTIONS][0] == 3
    assert 1 < readings["web, MiB"][0] < 100_000
    assert readings["web, files"][0] > 2
    assert "gone, MiB" not in readings or not readings["gone, MiB"]
