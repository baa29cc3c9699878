"""The self-test passes on a system that is whole, and fails for each thing that is missing."""

from __future__ import annotations

import asyncio

import pytest
import redis

from esper import blueprints
from esper.services.tamiyo import EnhancedTamiyoService, test_integration
from esper.utils.config import ServiceConfig
from tests.esper.services.tamiyo.fake_urza import FakeUrza


def arguments(valkey_url: str, urza: FakeUrza) -> list[str]:
    return ["--redis-url", valkey_url, "--urza-url", urza.url, "--token", "esp_test"]


def test_a_system_that_is_whole_passes(
    valkey_url: str, valkey: redis.Redis, urza: FakeUrza, capsys: pytest.CaptureFixture[str]
) -> None:
    async def with_tamiyo() -> int:
        config = ServiceConfig(
            "tamiyo", redis_url=valkey_url, urza_url=urza.url, token="esp_test", instance="here-1"
        )
        service = EnhancedTamiyoService(config)
        await service.start()
        try:
            async with asyncio.timeout(300):
                while service.get_status()["connections"]["redis"] != "connected":
                    await asyncio.sleep(0.02)
            return await asyncio.to_thread(test_integration.main, arguments(valkey_url, urza))
        finally:
            await service.stop()

    status = asyncio.run(with_tamiyo())

    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "FAIL" not in printed
    assert "here-1 listens" in printed


def test_each_missing_part_is_named(
    valkey_url: str, valkey: redis.Redis, urza: FakeUrza, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = blueprints.list_blueprints()[0].slug
    urza.blueprints.remove(missing)

    assert test_integration.main(arguments(valkey_url, urza)) == 1

    printed = capsys.readouterr().out
    failed = {line.split(":")[0] for line in printed.splitlines() if line.startswith("FAIL")}
    assert failed == {"FAIL  server's catalogue", "FAIL  health stream", "FAIL  Tamiyo service"}
    assert missing in printed


def test_a_foreign_token_is_named(
    valkey_url: str, valkey: redis.Redis, urza: FakeUrza, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = [*arguments(valkey_url, urza)[:-1], "esp_other"]

    assert test_integration.main(foreign) == 1

    assert "FAIL  server: GET runs: 401" in capsys.readouterr().out


def test_nothing_configured_is_not_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert test_integration.main([]) == 1

    printed = capsys.readouterr().out
    assert "ok    adaptation pipeline" in printed
    assert "no server is named" in printed
    assert "no Redis is named" in printed
