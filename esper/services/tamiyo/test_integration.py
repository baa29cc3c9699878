"""Is a running Esper whole? ``python -m esper.services.tamiyo.test_integration [--urza-url …]``.

Despite its name, which the seed chose, this is a program and holds no pytest tests: it looks at a
running system from outside and prints a line for each thing that must be there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import redis.asyncio
import torch
from redis.exceptions import RedisError
from torch import nn

from esper import blueprints
from esper.contracts import AdaptationDecision, AdaptationType
from esper.exceptions import ConfigurationError, EsperError
from esper.services.tamiyo import wire
from esper.services.tamiyo.blueprint_integration import ModelState, Phase2IntegrationOrchestrator
from esper.services.tamiyo.stream import GROUP, STREAM
from esper.services.tamiyo.urza import Urza
from esper.utils.config import ServiceConfig

STATUS_KEYS = {
    "active_adaptations",
    "blueprint_cache_stats",
    "execution_metrics",
    "safety_violations",
}
_LISTENS_WITHIN_MS = 30_000

# A check returns what it saw, or raises SelfTestError or one of Esper's or Redis's errors.
SelfCheck = Callable[[ServiceConfig], Awaitable[str]]


class SelfTestError(Exception):
    """Something is missing; the text says what."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each check.

    Returns:
        0 when everything is there, 1 when something is missing, 2 for a bad setting.
    """
    try:
        config = _config(arguments)
    except ConfigurationError as error:
        print(f"test_integration: {error}", file=sys.stderr)
        return 2
    return asyncio.run(_run(config))


async def _run(config: ServiceConfig) -> int:
    missing = 0
    for name, check in CHECKS:
        try:
            async with asyncio.timeout(30):
                print(f"ok    {name}: {await check(config)}", flush=True)
        except (SelfTestError, EsperError, RedisError, OSError, TimeoutError) as error:
            missing += 1
            print(f"FAIL  {name}: {str(error) or type(error).__name__}", flush=True)
    print(f"{len(CHECKS) - missing} of {len(CHECKS)} checks passed")
    return 1 if missing else 0


async def check_catalogue(config: ServiceConfig) -> str:
    slugs = [blueprint.slug for blueprint in blueprints.list_blueprints()]
    _require(slugs, "no blueprint is installed")
    return f"{len(slugs)} blueprints are installed"


async def check_pipeline(config: ServiceConfig) -> str:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.ones(4, 8)
    with torch.no_grad():
        before = model(x)
    orchestrator = Phase2IntegrationOrchestrator()
    success, details = await orchestrator.execute_adaptation_pipeline(
        decision=AdaptationDecision("0", AdaptationType.ADD_EFFICIENCY, confidence=0.9),
        model_state=ModelState(model=model, sample=x),
    )
    _require(success, details["reason"])
    orchestrator.undo(details["adaptation"])
    with torch.no_grad():
        _require(torch.equal(model(x), before), "undo did not bring the model back to the bit")
    return f"{details['blueprint']} was grafted in {details['pause_ms']:.1f} ms and undone exactly"


async def check_server(config: ServiceConfig) -> str:
    async with _urza(config) as urza:
        runs = await urza.live_runs()
        cases = await urza.experience()
    return f"answers; {len(runs)} live runs, experience with {len(cases)} blueprints"


async def check_server_catalogue(config: ServiceConfig) -> str:
    async with _urza(config) as urza:
        there = {str(blueprint["slug"]) for blueprint in await urza.blueprints()}
    here = {blueprint.slug for blueprint in blueprints.list_blueprints()}
    _require(here <= there, f"the server does not know {', '.join(sorted(here - there))}")
    return f"knows all {len(here)} blueprints"


async def check_status(config: ServiceConfig) -> str:
    async with _urza(config) as urza:
        status = await urza.integration_status()
    _require(status.keys() >= STATUS_KEYS, f"lacks {', '.join(sorted(STATUS_KEYS - set(status)))}")
    return (
        f"{len(status['active_adaptations'])} active adaptations, "
        f"{len(status['safety_violations'])} violations"
    )


async def check_snapshots(config: ServiceConfig) -> str:
    async with _urza(config) as urza:
        runs = [str(run["uid"]) for run in await urza.live_runs()]
        for run in runs:
            wire.report_from_wire(await urza.snapshot(run))
    return f"{len(runs)} of {len(runs)} live runs can be decided on"


async def check_stream(config: ServiceConfig) -> str:
    async with _redis(config) as client:
        groups = await client.xinfo_groups(STREAM) if await client.exists(STREAM) else []
    found = next((group for group in groups if group["name"] == GROUP.encode()), None)
    if found is None:
        raise SelfTestError(f"stream {STREAM} has no group {GROUP}: no Tamiyo has listened yet")
    return f"{found['pending']} entries are being worked on"


async def check_tamiyo(config: ServiceConfig) -> str:
    async with _redis(config) as client:
        consumers = (
            await client.xinfo_consumers(STREAM, GROUP) if await client.exists(STREAM) else []
        )
    listening = [item for item in consumers if item["idle"] < _LISTENS_WITHIN_MS]
    _require(listening, "nobody has read the health stream in the last 30 seconds")
    return ", ".join(sorted(item["name"].decode() for item in listening)) + " listens"


CHECKS: tuple[tuple[str, SelfCheck], ...] = (
    ("blueprint catalogue", check_catalogue),
    ("adaptation pipeline, in this process", check_pipeline),
    ("server", check_server),
    ("server's catalogue", check_server_catalogue),
    ("integration status", check_status),
    ("snapshots of live runs", check_snapshots),
    ("health stream", check_stream),
    ("Tamiyo service", check_tamiyo),
)


@contextlib.asynccontextmanager
async def _urza(config: ServiceConfig) -> AsyncIterator[Urza]:
    if not config.urza_url:
        raise SelfTestError("no server is named (--urza-url or ESPER_SERVER)")
    urza = Urza(config.urza_url, config.token, timeout_seconds=config.request_timeout_seconds)
    try:
        yield urza
    finally:
        await urza.close()


@contextlib.asynccontextmanager
async def _redis(config: ServiceConfig) -> AsyncIterator[redis.asyncio.Redis]:
    if not config.redis_url:
        raise SelfTestError("no Redis is named (--redis-url or REDIS_URL)")
    client = redis.asyncio.Redis.from_url(
        config.redis_url, socket_connect_timeout=5.0, socket_timeout=5.0
    )
    try:
        yield client
    finally:
        await client.aclose()


def _require(fact: object, otherwise: str) -> None:
    if not fact:
        raise SelfTestError(otherwise)


def _config(arguments: Sequence[str] | None) -> ServiceConfig:
    parser = argparse.ArgumentParser(
        prog="python -m esper.services.tamiyo.test_integration",
        description="Look at a running Esper from outside; exit 1 when something is missing.",
    )
    parser.add_argument("--urza-url", help="the Esper server (default: ESPER_SERVER)")
    parser.add_argument("--redis-url", help="the health stream (default: REDIS_URL)")
    parser.add_argument("--token", help="scope decide or read (default: ESPER_TOKEN)")
    given = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value}
    return ServiceConfig(name="tamiyo-self-test", **given)


if __name__ == "__main__":
    sys.exit(main())
