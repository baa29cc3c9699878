"""Tamiyo against a real Valkey and a server that answers over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from esper.blueprints import get_blueprint
from esper.contracts import AdaptationDecision, AdaptationType, RunSnapshot
from esper.contracts.variants import Variant, why_no_variant
from esper.health import Features
from esper.policy import BanditPolicy, HeuristicPolicy, Proposals
from esper.services.tamiyo import EnhancedTamiyoService
from esper.services.tamiyo.launch_enhanced import _config, _parse
from esper.services.tamiyo.stream import GROUP, STREAM
from esper.utils.config import ServiceConfig
from tests.esper.services.tamiyo.fake_urza import FakeRun, FakeUrza, health_values

TRIED = "GET blueprints/proj_lora_64/tried-sizes"


def notify(valkey: redis.Redis, run: FakeRun, *, steps: int = 10) -> None:
    """The run trains on, and the server adds its frame to the stream."""
    run.train(steps)
    valkey.xadd(
        STREAM,
        {
            "run": run.uid,
            "epoch": run.epoch,
            "seq": run.step,
            "layers": 3,
            "frames": 1,
            "steps": run.step,
            "wall_times": time.time(),
            "losses": float(run.loss[-1]),
            "values": health_values().tobytes(),
        },
    )


async def until(fact: Callable[[], object], *, seconds: float = 300.0) -> None:
    async with asyncio.timeout(seconds):
        while not fact():
            await asyncio.sleep(0.02)


def pending(valkey: redis.Redis) -> int:
    """Entries that somebody holds; -1 while there is no group."""
    try:
        summary: Any = valkey.xpending(STREAM, GROUP)
    except redis.ResponseError:
        return -1
    return int(summary["pending"])


def all_handled(valkey: redis.Redis) -> bool:
    """Every entry was delivered to somebody, and acknowledged."""
    groups: Any = valkey.xinfo_groups(STREAM)
    return bool(groups) and groups[0]["lag"] == 0 and groups[0]["pending"] == 0


def config(valkey_url: str | None, urza: FakeUrza, **settings: Any) -> ServiceConfig:
    quick = {"refresh_seconds": 0.5, "heartbeat_seconds": 0.2, "claim_seconds": 0.5}
    return ServiceConfig(
        "tamiyo", redis_url=valkey_url, urza_url=urza.url, token="esp_test", **{**quick, **settings}
    )


@asynccontextmanager
async def running(settings: ServiceConfig, **parts: Any) -> AsyncIterator[EnhancedTamiyoService]:
    service = EnhancedTamiyoService(settings, **parts)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


class StubbornPolicy:
    """Always wants the same, so that gates have something to close on."""

    name = "stubborn-1"

    def __init__(self, layer: str = "fc1", confidence: float = 0.9) -> None:
        self.decision = AdaptationDecision(layer, AdaptationType.ADD_DIAGNOSTIC, confidence)

    def propose(self, snapshot: RunSnapshot, features: Features, rng: object) -> Proposals:
        return Proposals((self.decision,))


async def test_a_flat_run_gets_one_proposal_with_its_evidence(
    valkey_url: str, valkey: redis.Redis, urza: FakeUrza
) -> None:
    run = urza.runs["run_a"]
    async with running(config(valkey_url, urza)) as service:
        for _ in range(5):
            notify(valkey, run)
            await asyncio.sleep(0.05)
        await until(lambda: urza.proposals)
        await until(lambda: pending(valkey) == 0)
        await until(lambda: urza.heartbeats)
        await until(lambda: service.get_status()["runs"]["run_a"]["step"] == run.step)
        status = service.get_status()

    assert len(urza.proposals) == 1
    ((key, body),) = urza.proposals.items()
    assert key == f"run_a:1:{body['step']}:{body['layer']}:{body['adaptation_type']}"
    assert body["blueprint"]
    assert body["evidence"]["loss_plateau"] > 0.8
    assert body["reasons"]
    assert body["checks"]
    assert len(body["why_not"]) == status["blueprints_loaded"] - 1
    assert status["connections"] == {"redis": "connected", "urza": "connected"}
    assert urza.heartbeats[-1]["instance"] == service.config.instance


async def test_what_could_not_be_posted_is_posted_once_when_the_server_is_back(
    valkey_url: str, valkey: redis.Redis, urza: FakeUrza
) -> None:
    urza.trouble = lambda method, path: (503, {"title": "maintenance"})
    async with running(config(valkey_url, urza)) as service:
        notify(valkey, urza.runs["run_a"])
        await until(lambda: service.get_status()["connections"]["urza"] == "reconnecting")
        await until(lambda: pending(valkey) == 1)
        assert urza.proposals == {}

        urza.trouble = lambda method, path: None
        await until(lambda: urza.proposals)
        await until(lambda: pending(valkey) == 0)
        await asyncio.sleep(0.3)

    assert len(urza.proposals) == 1
    assert urza.proposal_attempts == 1


async def test_a_lost_answer_repeats_the_proposal_under_the_same_key(
    valkey_url: str, valkey: redis.Redis, urza: FakeUrza
) -> None:
    """The server stored it and then failed to say so."""
    lost = iter([True])
    keys: list[str] = []

    def answer_is_lost(run: FakeRun, key: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        keys.append(key)
        answer = original(run, key, body)
        run.in_flight.clear()  # as if the snapshot were read before it was stored
        return (500, {}) if next(lost, False) else answer

    original = urza._propose
    urza._propose = answer_is_lost  # type: ignore[method-assign]
    async with running(config(valkey_url, urza, refresh_seconds=30.0)):
        notify(valkey, urza.runs["run_a"])
        await until(lambda: len(keys) >= 2)
        await until(lambda: pending(valkey) == 0)

    assert len(set(keys)) == 1
    assert len(urza.proposals) == 1


async def test_a_flushed_redis_loses_notifications_only(
    valkey_url: str, valkey: redis.Redis, urza: FakeUrza
) -> None:
    run = urza.runs["run_a"]
    async with running(config(valkey_url, urza)) as service:
        notify(valkey, run)
        await until(lambda: urza.proposals)

        valkey.flushall()
        run.in_flight.clear()
        urza.proposals.clear()

        def a_notification_arrived() -> bool:
            notify(valkey, run)
            return bool(urza.proposals)

        await until(a_notification_arrived)
        await until(lambda: pending(valkey) == 0)
        assert service.get_status()["connections"]["redis"] == "connected"


async def test_without_redis_runs_are_polled(urza: FakeUrza) -> None:
    """A Redis that is away, and one that was never configured."""
    for redis_url in ("redis://127.0.0.1:1/0", None):
        urza.proposals.clear()
        urza.runs["run_a"].in_flight.clear()
        async with running(config(redis_url, urza)):
            await until(lambda: urza.proposals)
        assert len(urza.proposals) == 1


async def test_runs_are_polled_when_no_notification_comes(
    valkey_url: str, valkey: redis.Redis, urza: FakeUrza
) -> None:
    run = urza.runs["run_a"]
    run.in_flight = {"fc1", "fc2", "head"}
    async with running(config(valkey_url, urza)) as service:
        await until(lambda: service.get_status()["connections"]["redis"] == "connected")
        await until(lambda: service.get_status()["runs"])

        run.train(10)  # stored by the server, which cannot reach Redis
        run.in_flight.clear()

        await until(lambda: urza.proposals)


async def test_entries_of_an_instance_that_died_are_taken_over(
    valkey_url: str, valkey: redis.Redis, urza: FakeUrza
) -> None:
    valkey.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
    notify(valkey, urza.runs["run_a"])
    valkey.xreadgroup(GROUP, "dead-1", {STREAM: ">"})
    assert pending(valkey) == 1

    async with running(config(valkey_url, urza)):
        await until(lambda: pending(valkey) == 0)
        await until(lambda: urza.proposals)

    assert len(urza.proposals) == 1


async def test_several_tamiyos_share_the_runs_and_decide_once(
    valkey_url: str, valkey: redis.Redis, urza: FakeUrza
) -> None:
    for uid in ("run_b", "run_c"):
        urza.runs[uid] = FakeRun(uid)
    async with (
        running(config(valkey_url, urza, instance="one")),
        running(config(valkey_url, urza, instance="two")),
    ):
        for _ in range(4):
            for run in urza.runs.values():
                notify(valkey, run)
            await asyncio.sleep(0.05)
        await until(lambda: len(urza.proposals) >= 3)
        await until(lambda: pending(valkey) == 0)

    decided = [(key.split(":")[0], body["layer"]) for key, body in urza.proposals.items()]
    assert sorted({run for run, _ in decided}) == ["run_a", "run_b", "run_c"]
    assert len(decided) == len(set(decided))


async def test_one_run_that_breaks_us_does_not_hold_up_the_others(
    valkey_url: str, valkey: redis.Redis, urza: FakeUrza, caplog: pytest.LogCaptureFixture
) -> None:
    urza.runs["run_b"] = FakeRun("run_b")
    urza.trouble = lambda method, path: (200, {"run": 7}) if "run_a/snap" in path else None
    async with running(config(valkey_url, urza)):
        valkey.xadd(STREAM, {"run": "run_b", "nonsense": "x"})
        notify(valkey, urza.runs["run_a"])
        notify(valkey, urza.runs["run_b"])
        await until(lambda: urza.proposals)

    assert {key.split(":")[0] for key in urza.proposals} == {"run_b"}


async def test_entries_of_a_run_that_is_gone_are_let_go(
    valkey_url: str, valkey: redis.Redis, urza: FakeUrza
) -> None:
    async with running(config(valkey_url, urza)) as service:
        notify(valkey, FakeRun("run_gone"))
        await until(lambda: "GET runs/run_gone/snapshot" in urza.requests)
        await until(lambda: pending(valkey) == 0)
        assert "run_gone" not in service.get_status()["runs"]


async def test_a_broken_limit_is_noted_once_in_a_while(
    valkey_url: str, valkey: redis.Redis, urza: FakeUrza
) -> None:
    run = urza.runs["run_a"]
    low = StubbornPolicy(confidence=0.02)
    async with running(config(valkey_url, urza), policy=low) as service:
        for _ in range(6):
            notify(valkey, run)
            await asyncio.sleep(0.1)
        await until(lambda: service.get_status()["decisions"]["decisions"] >= 3)

    assert len(urza.declines) == 1
    assert urza.declines[0]["layer"] == "fc1"
    assert "confidence" in [check["rule"] for check in urza.declines[0]["checks"]]
    assert urza.proposals == {}


async def test_a_proposal_that_the_server_refuses_is_not_repeated_with_every_frame(
    valkey_url: str, valkey: redis.Redis, urza: FakeUrza
) -> None:
    run = urza.runs["run_a"]
    urza.trouble = lambda method, path: (
        (409, {"code": "gate-closed", "detail": "no"}) if path.endswith("/adaptations") else None
    )
    settings = config(valkey_url, urza, refresh_seconds=20.0)
    async with running(settings, policy=StubbornPolicy()) as service:
        for _ in range(6):
            notify(valkey, run)
            await asyncio.sleep(0.1)
        await until(lambda: pending(valkey) == 0)
        assert service.get_status()["decisions"]["decisions"] >= 2

    assert urza.requests.count("POST runs/run_a/adaptations") == 1


def in_probation(run: FakeRun, *, seconds_left: float = 600.0) -> dict[str, Any]:
    deadline = datetime.now(UTC) + timedelta(seconds=seconds_left)
    return {
        "uid": "adp_1",
        "state": "probation",
        "layer": "fc1",
        "blueprint": "proj_lora_64",
        "kind": "parallel",
        "risk": "low",
        "graft_step": run.step,
        "deadline_at": deadline.isoformat().replace("+00:00", "Z"),
    }


def look(step: int, *, gain: float) -> dict[str, Any]:
    values = {"ablation_gain:adp_1": gain, "ablation_loss:adp_1": 1.0}
    return {"step": step, "wall_time": 0, "values": values}


@pytest.fixture
def described(urza: FakeUrza) -> FakeUrza:
    """Tells what was grafted, as the server's resource does."""
    resource = {
        "uid": "adp_1",
        "blueprint": "proj_lora_64",
        "config": {},
        "certificate": {"memory_mib": 0.01, "latency_ms": 0.05},
    }
    urza.trouble = lambda method, path: (
        (200, resource) if (method, path) == ("GET", "adaptations/adp_1") else None
    )
    return urza


async def test_a_graft_that_earns_its_place_is_kept_with_its_reward(
    valkey_url: str, valkey: redis.Redis, described: FakeUrza
) -> None:
    run = described.runs["run_a"]
    run.active = [in_probation(run)]
    run.in_flight = {"fc1", "fc2", "head"}
    run.metrics = [look(run.step + age, gain=0.2) for age in (110, 130, 150)]
    described.if_match_needed = True
    async with running(config(valkey_url, described)):
        run.train(100, loss=0.7)
        notify(valkey, run)
        await asyncio.sleep(0.3)
        assert described.verdicts == {}  # too few looks

        run.metrics.append(look(run.step + 70, gain=0.21))
        run.train(100, loss=0.7)
        notify(valkey, run)
        await until(lambda: described.verdicts)

    verdict = described.verdicts["adp_1"]
    assert verdict["keep"] is True
    assert verdict["ablation_gain"] == pytest.approx(0.2025)
    assert 0.005 < verdict["ablation_low"] < 0.2025 < verdict["ablation_high"]
    assert verdict["forecast_gain"] > 0.1
    assert verdict["steps_observed"] >= 150
    assert verdict["reward"]["gain"] > 0
    assert verdict["reward"]["rollback"] == 0


async def test_no_data_at_the_deadline_is_never_success(
    valkey_url: str, valkey: redis.Redis, described: FakeUrza
) -> None:
    run = described.runs["run_a"]
    run.active = [in_probation(run, seconds_left=1.0)]
    async with running(config(valkey_url, described)):
        await until(lambda: described.verdicts)

    verdict = described.verdicts["adp_1"]
    assert verdict["keep"] is False
    assert "No data" in verdict["reason"]
    assert verdict["reward"]["rollback"] < 0
    assert list(described.verdicts) == ["adp_1"]


@pytest.mark.parametrize("learning", [True, False])
async def test_with_learning_a_verdict_leads_to_a_suggestion(
    valkey_url: str, described: FakeUrza, learning: bool
) -> None:
    run = described.runs["run_a"]
    run.active = [in_probation(run, seconds_left=1.0)]
    async with running(config(valkey_url, described, learning=learning)):
        await until(lambda: described.verdicts)
        # It is suggested before the run is looked at again.
        seen = described.requests.count("GET runs/run_a/snapshot")
        await until(lambda: described.requests.count("GET runs/run_a/snapshot") > seen)
    assert described.requests.count(TRIED) == int(learning)
    assert len(described.suggestions) == int(learning)
    for body in described.suggestions:
        assert not why_no_variant(body["factors"], get_blueprint("proj_lora_64").tunes)


async def test_without_learning_earlier_cases_change_nothing(urza: FakeUrza) -> None:
    seen: list[dict[str, Any]] = []
    known: list[tuple[Variant, ...]] = []

    class WatchingPolicy(StubbornPolicy):
        def propose(self, snapshot: RunSnapshot, features: Features, rng: object) -> Proposals:
            seen.append(dict(snapshot.experience))
            known.append(snapshot.variants)
            return Proposals()

    cases = {"proj_ia3": {"kept": 3, "rolled_back": 1, "mean_reward": 0.1}}
    admitted = {"uid": "var_1", "blueprint": "proj_lora_64", "factors": {"rank": 2.0}}
    more = {"experience": cases, "variants": [admitted]}
    snapshot = urza.runs["run_a"].snapshot
    urza.runs["run_a"].snapshot = lambda: {**snapshot(), **more}  # type: ignore[method-assign]
    for learning in (True, False):
        async with running(config(None, urza, learning=learning), policy=WatchingPolicy()):
            await until(lambda: len(seen) >= (1 if learning else 2))  # noqa: B023

    assert seen[0]["proj_ia3"].kept == 3
    assert [variant.uid for variant in known[0]] == ["var_1"]
    assert seen[-1] == {}
    assert known[-1] == ()


@pytest.mark.parametrize("learning", [True, False])
async def test_without_learning_a_promoted_challenger_does_not_decide(
    urza: FakeUrza, learning: bool
) -> None:
    snapshot = urza.runs["run_a"].snapshot
    urza.runs["run_a"].snapshot = lambda: {**snapshot(), "champion": BanditPolicy.name}  # type: ignore[method-assign]
    async with running(config(None, urza, learning=learning)):
        await until(lambda: urza.proposals or "POST runs/run_a/declines" in urza.requests)
    decided = {body["policy"] for body in urza.proposals.values()}
    assert decided <= {BanditPolicy.name if learning else HeuristicPolicy.name}
    assert decided or learning  # the bandit may draw to do nothing


@pytest.mark.parametrize("options", [[], ["--no-learning"]])
def test_the_option_no_learning_turns_it_off(options: list[str]) -> None:
    settings = _config(_parse(["--urza-url", "http://localhost:1", *options]))
    assert settings.learning is not bool(options)


# ── as a process ────────────────────────────────────────────────────────────────────────────────


def launch(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "esper.services.tamiyo.launch_enhanced", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        cwd=Path(__file__).parents[4],
    )


@pytest.mark.process
@pytest.mark.timeout(900)
async def test_killed_after_posting_and_before_acknowledging_it_decides_once(
    valkey_url: str, valkey: redis.Redis, urza: FakeUrza
) -> None:
    run = urza.runs["run_a"]
    notify(valkey, run)
    arguments = ("--redis-url", valkey_url, "--urza-url", urza.url)
    first = launch(*arguments, ESPER_TOKEN="esp_test")

    def kill_first() -> None:  # stored, not answered, not acknowledged
        first.kill()
        first.wait()

    urza.after_proposal = kill_first
    try:
        await until(lambda: first.poll() is not None)
        assert first.returncode == -signal.SIGKILL
        assert len(urza.proposals) == 1
        assert not all_handled(valkey)
        urza.after_proposal = lambda: None

        second = launch(*arguments, ESPER_TOKEN="esp_test")
        try:
            notify(valkey, run)
            # Also what the dead one held, if it came so far as to hold it.
            await until(lambda: all_handled(valkey))
            second.send_signal(signal.SIGTERM)
            await until(lambda: second.poll() is not None)
            assert second.returncode == 0
        finally:
            second.kill()
            second.communicate()
    finally:
        first.kill()
        first.communicate()

    assert len(urza.proposals) == 1
    consumers: Any = valkey.xinfo_consumers(STREAM, GROUP)
    names = [consumer["name"].decode() for consumer in consumers]
    assert not any(name.endswith(f"-{second.pid}") for name in names)  # it has left the group


@pytest.mark.process
async def test_the_launcher_refuses_settings_that_make_no_sense() -> None:
    process = launch("--redis-url", "redis://127.0.0.1:1/0")
    output, _ = await asyncio.to_thread(process.communicate, timeout=600)

    assert process.returncode == 2
    assert "--urza-url" in output


async def test_the_status_page_answers_probes(urza: FakeUrza) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with running(config(None, urza, port=port)), httpx.AsyncClient() as client:
        alive = await client.get(f"http://127.0.0.1:{port}/healthz")
        status = await client.get(f"http://127.0.0.1:{port}/")
        refused = await client.post(f"http://127.0.0.1:{port}/")
        missing = await client.get(f"http://127.0.0.1:{port}/etc/passwd")

    assert alive.json() == {"status": "ok"}
    assert json.loads(status.text)["state"] == "running"
    assert (refused.status_code, missing.status_code) == (405, 404)
    assert "esp_test" not in status.text
