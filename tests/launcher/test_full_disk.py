"""The disk of a running Esper is full for a while: nothing ends, it is named, and it passes."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

pytestmark = [pytest.mark.process, pytest.mark.timeout(1500)]
LIMIT_SECONDS = 300.0  # so that a broken test ends


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 MiB for the data directory."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = [*("mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs"), str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root can mount a small file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def readiness(url: str) -> dict[str, Any]:
    try:
        with urlopen(f"{url}/readyz", timeout=60) as answer:  # noqa: S310 (loopback)
            found: dict[str, Any] = json.load(answer)
    except HTTPError as error:
        found = json.load(error)
    return found


def until(condition: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, why
        time.sleep(0.1)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 65536):
            pass


def test_a_full_disk_stops_no_supervision_and_is_named(start_esper: Any, disk: Path) -> None:
    esper = start_esper(disk / "data", "--no-demo")
    url, before = esper.url, esper.runtime["children"]
    fill(disk / "filler")
    until(lambda: not readiness(url)["checks"]["disk"], "the full disk is named")
    assert "is full" in readiness(url)["problems"][0]
    killed = ("worker-control", "beat")
    for child in killed:  # the supervisor logs the end of each, and notes the new process
        esper.kill(child)
    until(lambda: len(set(esper.processes()) - set(before.values())) >= 2, "they are started again")
    (disk / "filler").unlink()
    until(lambda: readiness(url)["ready"], "it is ready again")
    until(
        lambda: all(esper.runtime["children"][name] != before[name] for name in killed),
        "the new processes are noted",
    )
    assert esper.runtime["children"]["web"] == before["web"]
    assert esper.stop() == 0
