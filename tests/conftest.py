"""The shared cast: a temporary PostgreSQL, a running Esper, and the keys of the tests."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from hosts.keyring import read_keyring
from hosts.paths import ROOT
from hosts.processes import end_marked, marked_processes
from hosts.runtime import read_runtime
from launcher.supervisor.ports import any_free_port
from tests.browser import WAIT_MS, open_chromium

# Limits, so that a broken test ends. Generous: a busy machine is no fault of the code.
START_SECONDS = 300.0
RESTART_SECONDS = 300.0
STOP_SECONDS = 120.0
NO_POSTGRES = (
    "This test needs PostgreSQL, and there is none: no initdb on PATH or under "
    "/usr/lib/postgresql. Install Debian's package postgresql (./check does, where it is root)."
)

# --- keys ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def kernel_private_key() -> str:
    """Signs kernels that the test settings trust."""
    from django.conf import settings

    return str(settings.KERNEL_PRIVATE_KEY_OF_TESTS)


# --- PostgreSQL ---------------------------------------------------------------------------------
# A session that holds a test marked ``postgres`` runs all its database tests on PostgreSQL: Django
# has one default database, and a second one beside it would not be what the code under test uses.


def pytest_collection_finish(session: pytest.Session) -> None:
    marked = any(item.get_closest_marker("postgres") for item in session.items)
    session.config.stash[_WANTS_POSTGRES] = marked


_WANTS_POSTGRES = pytest.StashKey[bool]()


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A fresh PostgreSQL cluster on a free port, gone at the end."""
    programs = _postgres_programs()
    if programs is None:
        pytest.fail(NO_POSTGRES)
    # Not under pytest's own directory: another session of the same user would close it to postgres.
    with tempfile.TemporaryDirectory(prefix="esper-postgres-") as base:
        cluster = _Cluster(programs, Path(base), any_free_port())
        cluster.start()
        yield cluster.url
        cluster.stop()


@pytest.fixture(autouse=True)
def _postgres_is_there(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("postgres"):
        request.getfixturevalue("postgres_url")


@pytest.fixture(scope="session")
def django_db_modify_db_settings(
    request: pytest.FixtureRequest, django_db_modify_db_settings_parallel_suffix: None
) -> None:
    """pytest-django's hook: which database the tests get."""
    wanted = request.config.stash.get(_WANTS_POSTGRES, False)
    if wanted and _postgres_programs() is not None and "DATABASE_URL" not in os.environ:
        _use_database(request.getfixturevalue("postgres_url"))


def _use_database(url: str) -> None:
    from django.db import connections

    from esper_web.env import database_from_url

    config = database_from_url(url)
    config["OPTIONS"].pop("pool", None)  # it would hold connections while the database is dropped
    connections.settings["default"] = connections.configure_settings({"default": config})["default"]
    del connections["default"]


def _postgres_programs() -> Path | None:
    newest_first = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    found = newest_first[0] if newest_first else shutil.which("initdb")
    return Path(found).parent if found else None


@dataclass
class _Cluster:
    programs: Path
    base: Path
    port: int

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        self.base.chmod(0o755)  # the user postgres must be able to get in
        data = self.base / "data"
        data.mkdir()
        if os.getuid() == 0:
            shutil.chown(data, "postgres")
        self._run(
            "initdb", "-D", str(data), "-U", "postgres", "-A", "trust", "-N", "--locale=C.UTF-8"
        )
        options = (
            f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' "
            "-c fsync=off -c shared_buffers=32MB -c max_connections=60"
        )
        log = data / "server.log"
        self._run("pg_ctl", "-D", str(data), "-o", options, "-l", str(log), "-w", "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.base / "data"), "-m", "immediate", "-w", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        # PostgreSQL refuses to run as root.
        who = ("runuser", "-u", "postgres", "--") if os.getuid() == 0 else ()
        subprocess.run(
            [*who, str(self.programs / program), *arguments],
            check=True,
            cwd="/",
            stdout=subprocess.DEVNULL,
            timeout=60,
        )


# --- a running Esper ----------------------------------------------------------------------------


@dataclass
class RunningEsper:
    """A real ``./up`` on free ports in a temporary directory."""

    data_dir: Path
    process: subprocess.Popen[bytes]
    mark: str
    console: Path

    @property
    def runtime(self) -> dict[str, Any]:
        """``url, redis_port, ready, children {name: pid}``; see hosts.runtime."""
        return read_runtime(self.data_dir)

    @property
    def url(self) -> str:
        return str(self.runtime["url"])

    @property
    def keyring(self) -> dict[str, Any]:
        """Redis password, tokens and people."""
        return read_keyring(self.data_dir)

    @property
    def people(self) -> dict[str, str]:
        """Passwords by user name: vera, rafi, olga, carl, ada."""
        return {name: who["password"] for name, who in self.keyring["people"].items()}

    @property
    def redis_url(self) -> str:
        return f"redis://:{self.keyring['redis_password']}@127.0.0.1:{self.runtime['redis_port']}/0"

    def pid(self, child: str) -> int:
        """The process id of valkey, web, worker-control, worker-compile, beat, tamiyo, a demo."""
        return int(self.runtime["children"][child])

    def kill(self, child: str) -> int:
        """``kill -9``; returns the process id that is gone."""
        pid = self.pid(child)
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_restarted(self, child: str, old_pid: int, seconds: float = RESTART_SECONDS) -> int:
        """The new process id, once there is one."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid = self.runtime.get("children", {}).get(child, old_pid)
            if pid != old_pid:
                return int(pid)
            time.sleep(0.1)
        raise AssertionError(f"{child} did not come back in {seconds} s:\n{self.tail()}")

    def processes(self) -> list[int]:
        """Everything that it has started and that lives."""
        return marked_processes(str(self.runtime.get("id", self.mark)))

    def tail(self, characters: int = 6000) -> str:
        """The end of what it printed."""
        return self.console.read_text(errors="replace")[-characters:]

    def stop(self) -> int:
        """Ctrl-C; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            end_marked(self.mark)
            raise AssertionError(f"Esper did not stop:\n{self.tail()}") from None


def launch_esper(
    data_dir: Path, *arguments: str, environment: dict[str, str] | None = None
) -> RunningEsper:
    """Starts one and waits until all its processes are up."""
    data_dir.mkdir(parents=True, exist_ok=True)
    console = data_dir / f"console-{secrets.token_hex(3)}.log"
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in {"DJANGO_SETTINGS_MODULE", "DATABASE_URL", "REDIS_URL"}
    }
    with console.open("wb") as file:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "launcher", "up"),
                *("--data-dir", str(data_dir), "--port", "0", *arguments),
            ],
            cwd=ROOT,
            env=inherited | (environment or {}),
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    esper = RunningEsper(data_dir, process, "", console)
    deadline = time.monotonic() + START_SECONDS
    # A killed predecessor may have left a file that says ready.
    while not (esper.runtime.get("ready") and esper.runtime["pid"] == process.pid):
        if process.poll() is not None or time.monotonic() > deadline:
            esper.stop()
            raise AssertionError(f"Esper did not start:\n{esper.tail()}")
        time.sleep(0.1)
    esper.mark = str(esper.runtime["id"])
    return esper


@pytest.fixture(scope="session")
def running_esper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEsper]:
    """One for the whole session, without demo trainers."""
    esper = launch_esper(Path(tmp_path_factory.mktemp("esper")), "--no-demo")
    yield esper
    esper.stop()


@pytest.fixture
def start_esper() -> Iterator[Callable[..., RunningEsper]]:
    """``start_esper(data_dir, *arguments, environment=None)``: more of them, stopped at the end."""
    started: list[RunningEsper] = []

    def start(
        data_dir: Path, *arguments: str, environment: dict[str, str] | None = None
    ) -> RunningEsper:
        started.append(launch_esper(data_dir, *arguments, environment=environment))
        return started[-1]

    yield start
    for esper in started:
        esper.stop()


# --- a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One for each module. A module that uses it can have no asynchronous test."""
    with open_chromium() as browser:
        yield browser


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    """A page with cookies of its own."""
    context = chromium.new_context()
    context.set_default_timeout(WAIT_MS)
    yield context.new_page()
    context.close()
