"""The compile worker as docker/compose.yaml starts it, with its own secrets only, does its work."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from hosts.paths import ROOT
from launcher.supervisor.ports import any_free_port
from launcher.supervisor.valkey import valkey_program
from tests.postgres import NO_POSTGRES, Cluster, postgres_programs

pytestmark = [pytest.mark.process, pytest.mark.timeout(1500)]

DOCKER = ROOT / "docker"
SERVICES: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
WAIT_SECONDS = 600.0
PROPOSE = """
import django
django.setup()
from tests.apps.stage import make_stage
make_stage().propose()
"""


@dataclass
class Host:
    """A machine with PostgreSQL and Valkey; services run here as in their containers."""

    folder: Path
    database_port: int
    redis_port: int
    secrets: dict[str, str] = field(
        default_factory=lambda: runpy.run_path(str(DOCKER / "make-secrets"))["contents"]()
    )

    def environment(self, service: str) -> dict[str, str]:
        """What compose gives it; of the secrets only those that it names."""
        mounted = self.folder / service
        mounted.mkdir(exist_ok=True)
        for name in SERVICES[service]["secrets"]:
            content = self.secrets[name].replace(
                "@postgres:5432", f"@127.0.0.1:{self.database_port}"
            )
            (mounted / name).write_text(
                content.replace("@redis:6379", f"@127.0.0.1:{self.redis_port}")
            )
        given = {
            name: re.sub(r"\$\{\w+:-(.*?)\}", r"\1", str(value)).replace(
                "/run/secrets", str(mounted)
            )
            for name, value in SERVICES[service].get("environment", {}).items()
        }
        return given | {
            "ALLOWED_HOSTS": "esper.example.org",
            "CSRF_TRUSTED_ORIGINS": "https://esper.example.org",
            "ESPER_HOST_NAME": "docker",
            "ESPER_WORKER_CAPABILITIES": "cpu",
            "ESPER_WORKER_HEARTBEAT_SECONDS": "1",
            "ESPER_DATA_DIR": str(self.folder / "data"),
            "HOME": os.environ.get("HOME", "/"),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }

    def command(self, service: str) -> list[str]:
        return [part.replace("$$", "$") for part in SERVICES[service]["command"]]

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        address = f"host=127.0.0.1 port={self.database_port} dbname=esper user=postgres"
        with psycopg.connect(address) as connection:
            return connection.execute(statement).fetchall()  # type: ignore[arg-type]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    programs = postgres_programs()
    if programs is None:
        pytest.fail(NO_POSTGRES)
    made = Host(tmp_path, any_free_port(), any_free_port())
    (tmp_path / "acl").write_text(made.secrets["valkey_acl"])
    arguments = ("--port", str(made.redis_port), "--bind", "127.0.0.1", "--dir", str(tmp_path))
    # Not under pytest's own directory, which the user postgres cannot enter.
    with (
        tempfile.TemporaryDirectory(prefix="esper-postgres-") as base,
        subprocess.Popen(
            [valkey_program(), *arguments, "--aclfile", str(tmp_path / "acl")],
            stdout=subprocess.DEVNULL,
        ) as valkey,
    ):
        cluster = Cluster(programs, Path(base), made.database_port)
        try:
            cluster.start()
            yield made
            cluster.stop()
        finally:
            valkey.kill()


def test_it_builds_the_kernel_of_an_approved_adaptation(host: Host) -> None:
    _create_roles(host)
    _run(host.command("migrate"), host.environment("migrate"))
    # As web would have it: proposed, approved by rule, and queued.
    web = host.environment("web") | {"DJANGO_SETTINGS_MODULE": "esper_web.settings.production"}
    _run([sys.executable, "-c", PROPOSE], web)

    environment = host.environment("worker-compile")
    assert "SECRET_KEY_FILE" not in environment
    log = host.folder / "worker.log"
    with log.open("wb") as out:
        worker = subprocess.Popen(
            host.command("worker-compile"), env=environment, cwd=ROOT, stdout=out, stderr=out
        )
    try:
        _wait_until(host, "SELECT state = 'compiled' FROM adaptations_adaptation", worker, log)
        _wait_until(host, "SELECT state = 'idle' FROM workers_worker", worker, log)
    finally:
        worker.terminate()
        worker.wait(120)
    [(queues, devices)] = host.query("SELECT queues, devices FROM workers_worker")
    assert (queues, bool(devices)) == (["compile.cpu"], True)
    [(kernels,)] = host.query("SELECT count(*) FROM kernels_kernel")
    assert kernels == 1
    assert host.query("SELECT state FROM workers_worker") == [("offline",)]
    for refusal in ("permission denied", "row-level security", "NoPermission"):
        assert refusal not in log.read_text()


def _create_roles(host: Host) -> None:
    names = ("database_owner_password", "database_password", "compile_database_password")
    host.environment("postgres")
    files = {f"{name.upper()}_FILE": str(host.folder / "postgres" / name) for name in names}
    where = {"PGHOST": "127.0.0.1", "PGPORT": str(host.database_port)}
    _run(["sh", str(DOCKER / "postgres-roles.sh")], {**os.environ, **where, **files})


def _run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _wait_until(host: Host, question: str, worker: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while host.query(question) != [(True,)]:
        ended = worker.poll() is not None or time.monotonic() > deadline
        assert not ended, f"{question}\n{log.read_text()[-4000:]}"
        time.sleep(0.2)
