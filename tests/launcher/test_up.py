"""The real ``./up``: starts, survives kills, stops, and starts again with its data."""

from __future__ import annotations

import json
import os
import signal
import stat
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from hosts.processes import marked_processes
from tests.another_python import esper
from tests.running import RESTART_SECONDS

pytestmark = [pytest.mark.process, pytest.mark.timeout(1500)]
SERVICES = {"valkey", "web", "worker-control", "worker-compile", "beat", "tamiyo"}


def ready(url: str) -> dict[str, Any]:
    with urlopen(f"{url}/readyz", timeout=300) as answer:  # noqa: S310 (loopback)
        found: dict[str, Any] = json.load(answer)
        return found


def wait_ready(url: str, seconds: float = RESTART_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if all(ready(url)["checks"].values()):
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, "it did not become ready again"
        time.sleep(0.2)


def test_all_services_run_and_answer(running_esper: Any) -> None:
    assert set(running_esper.runtime["children"]) == SERVICES
    wait_ready(running_esper.url)
    found = ready(running_esper.url)
    assert found["checks"] == {"database": True, "redis": True, "disk": True}
    assert found["problems"] == found["down"] == []
    ages = {name: part["age_seconds"] for name, part in found["parts"].items()}
    assert set(ages) == {"sweep", "control", "compile", "tamiyo"}


def test_people_get_passwords_that_no_log_file_knows(running_esper: Any) -> None:
    passwords = running_esper.people
    assert set(passwords) == {"vera", "rafi", "olga", "carl", "ada"}
    assert "olga" in running_esper.tail()
    for log in (running_esper.data_dir / "log").glob("*.log"):
        text = log.read_text()
        assert not [password for password in passwords.values() if password in text], log.name


def test_secrets_are_private_and_not_on_any_command_line(running_esper: Any) -> None:
    keyring = running_esper.keyring
    mode = stat.S_IMODE((running_esper.data_dir / "secrets.json").stat().st_mode)
    assert mode == 0o600
    secrets = [keyring["redis_password"], keyring["secret_key"], *keyring["tokens"].values()]
    for pid in running_esper.processes():
        command = Path(f"/proc/{pid}/cmdline").read_text()
        assert not [secret for secret in secrets if secret in command]


def test_only_the_compile_worker_knows_the_kernel_key(running_esper: Any) -> None:
    knowing = {
        name
        for name, pid in running_esper.runtime["children"].items()
        if b"ESPER_KERNEL_KEY_FILE=" in Path(f"/proc/{pid}/environ").read_bytes()
    }
    assert knowing == {"worker-compile"}


def test_valkey_asks_for_its_password(running_esper: Any) -> None:
    port = running_esper.runtime["redis_port"]
    once = Retry(NoBackoff(), 0)
    with redis.Redis(port=port, retry=once) as unknown, pytest.raises(redis.AuthenticationError):
        unknown.ping()
    with redis.Redis.from_url(running_esper.redis_url) as known:
        assert known.ping()


@pytest.mark.parametrize(
    "child", ["web", "worker-control", "worker-compile", "beat", "tamiyo", "valkey"]
)
def test_a_killed_child_comes_back_and_the_others_stay(running_esper: Any, child: str) -> None:
    before = running_esper.runtime["children"]
    running_esper.wait_restarted(child, running_esper.kill(child))
    wait_ready(running_esper.url)
    after = running_esper.runtime["children"]
    assert set(after) == SERVICES
    assert {name for name in SERVICES if before[name] != after[name]} == {child}
    assert f"{child} ended (killed by SIGKILL)" in running_esper.tail(20000)


def test_a_second_up_on_the_same_data_is_refused(running_esper: Any) -> None:
    answer = esper("up", "--port", "0", "--data-dir", str(running_esper.data_dir))
    assert answer.returncode == 1
    assert "already runs on" in answer.stdout
    assert ready(running_esper.url)["ready"]


def test_after_a_stop_and_after_a_kill_nothing_stays_and_it_starts_again_with_its_data(
    running_esper: Any,
) -> None:
    people, mark = running_esper.people, running_esper.mark
    assert running_esper.stop() == 0
    assert marked_processes(mark) == []
    assert not (running_esper.data_dir / "runtime.json").exists()
    running_esper.start_again("--no-demo")
    assert running_esper.people == people
    assert people["olga"] not in running_esper.tail()  # shown once
    mark = running_esper.mark
    os.kill(running_esper.process.pid, signal.SIGKILL)
    running_esper.process.wait()
    running_esper.start_again("--no-demo")  # the tests of other files use it from here on
    assert marked_processes(mark) == []
    assert set(running_esper.runtime["children"]) == SERVICES
    assert running_esper.people == people
