"""The processes under attack, as an installation with two of each starts them.

trainers ─► bad network ─► nginx ─┬► web of esper up ─┬─► PostgreSQL, Valkey
                                  └► second web ──────┘
esper up: Valkey, web, control worker, compile worker, beat, Tamiyo; beside it a second Tamiyo
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from hosts.paths import ROOT
from hosts.processes import dies_with_parent
from launcher.supervisor import plan
from launcher.supervisor.ports import any_free_port
from tests.nemesis import fake_trainer, real_trainer
from tests.nemesis.bad_network import BadNetwork
from tests.postgres import Cluster, postgres_programs
from tests.running import RunningEsper, launch_esper

# What takes half a minute in production takes seconds here.
HASTE = {
    "ESPER_COMPILE_LEASE_SECONDS": "4",
    "ESPER_COMPILE_HEARTBEAT_SECONDS": "1",
    "ESPER_WORKER_HEARTBEAT_SECONDS": "1",
    "ESPER_WORKER_CRASHES_MAX": "1000",
    "ESPER_RUN_UNREACHABLE_SECONDS": "10",
}
NGINX = """\
daemon off;
{user}
pid {folder}/nginx.pid;
error_log {folder}/nginx.log warn;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_max_body_size 2m;
  client_body_temp_path {folder}/nginx-body;
  proxy_temp_path {folder}/nginx-proxy;
  fastcgi_temp_path {folder}/nginx-fastcgi;
  uwsgi_temp_path {folder}/nginx-uwsgi;
  scgi_temp_path {folder}/nginx-scgi;
  map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
  upstream web {{ {servers} keepalive 32; }}
  server {{
    listen 127.0.0.1:{port};
    proxy_http_version 1.1;
    proxy_set_header Host $host:$server_port;
    proxy_set_header Connection $connection_upgrade;
    proxy_set_header Upgrade $http_upgrade;
    location / {{ proxy_pass http://web; }}
    location /ws/ {{ proxy_pass http://web; proxy_read_timeout 3600s; proxy_buffering off; }}
  }}
}}
"""


@dataclass
class Kept:
    """A process that is started again whenever it has ended."""

    start: Callable[[], Any]
    process: Any = None

    def lives(self) -> bool:
        if self.process is None:
            return False
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll() is None
        return bool(self.process.is_alive())


@dataclass
class Installation:
    """Everything that runs, below ``folder``.

    Attributes:
        kept: our own processes by name; ``esper`` watches over its own.
    """

    folder: Path
    seed: int
    cluster: Cluster
    esper: RunningEsper
    network: BadNetwork
    entrance: int  # the port of nginx
    kept: dict[str, Kept] = field(default_factory=dict)
    restarts: int = 0
    _stopping: threading.Event = field(default_factory=threading.Event)
    _keeper: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where people and trainers find it."""
        return f"http://127.0.0.1:{self.entrance}"

    def database(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.cluster.url, autocommit=True, connect_timeout=10)

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Read the database itself, also while it is being restarted."""
        deadline = time.monotonic() + 120
        while True:
            try:
                with self.database() as database:
                    return database.execute(query, values or None).fetchall()
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    # --- processes

    def add(self, name: str, start: Callable[[], Any]) -> None:
        self.kept[name] = Kept(start, start())

    def add_trainer(self, name: str, run: Callable[[Any], None], options: Any) -> None:
        def start() -> Any:
            process = _CONTEXT.Process(target=run, args=(options,), name=name, daemon=True)
            process.start()
            return process

        self.add(name, start)

    def keep(self) -> None:
        """Start what has ended, until ``stop``; in a thread."""
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._keeper.start()

    def _keep(self) -> None:
        while not self._stopping.wait(0.3):
            for kept in list(self.kept.values()):
                if not kept.lives() and not self._stopping.is_set():
                    kept.process = kept.start()
                    self.restarts += 1

    def pids(self) -> dict[str, int]:
        """Every process that may be killed or frozen, by name."""
        own = {name: kept.process.pid for name, kept in self.kept.items() if kept.lives()}
        return {**self.esper.runtime.get("children", {}), **own}

    def stop(self) -> None:
        self._stopping.set()
        if self._keeper is not None:
            self._keeper.join(30)
        for kept in self.kept.values():
            if kept.lives():
                with suppress(ProcessLookupError):
                    os.kill(kept.process.pid, signal.SIGCONT)
                kept.process.kill()
        for kept in self.kept.values():
            waits = kept.process.wait if hasattr(kept.process, "wait") else kept.process.join
            waits(30)
        self.network.stop()
        for pid in self.esper.runtime.get("children", {}).values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.esper.stop()
        self.cluster.stop()
        shutil.rmtree(self.cluster.base, ignore_errors=True)


_CONTEXT = multiprocessing.get_context("forkserver")


def start_installation(folder: Path, *, seed: int) -> Installation:
    """Everything but the trainers.

    Raises:
        RuntimeError: a program is missing.
    """
    programs = postgres_programs()
    if programs is None:
        raise RuntimeError("the nemesis needs PostgreSQL: there is no initdb")
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    _CONTEXT.set_forkserver_preload(
        ["tests.nemesis.fake_trainer", "tests.nemesis.real_trainer", "esper.remedies"]
    )
    cluster = Cluster(programs, Path(tempfile.mkdtemp(prefix="esper-nemesis-")), any_free_port())
    cluster.start()
    environment = {**HASTE, "DATABASE_URL": cluster.url}
    try:
        esper = launch_esper(folder / "data", "--no-demo", environment=environment)
    except BaseException:
        cluster.stop()
        shutil.rmtree(cluster.base, ignore_errors=True)
        raise
    entrance = any_free_port()
    network = BadNetwork(any_free_port(), entrance, seed)
    installation = Installation(folder, seed, cluster, esper, network, entrance)
    try:
        _start_seconds(installation, environment)
        network.start()
        installation.keep()
    except BaseException:
        installation.stop()
        raise
    return installation


def _start_seconds(installation: Installation, environment: dict[str, str]) -> None:
    """A second web process, an hour fast, a second Tamiyo, and nginx before the web processes."""
    esper, port = installation.esper, any_free_port()
    site = plan.Site(
        data_dir=esper.data_dir,
        port=port,
        redis_url=esper.redis_url,
        redis_port=None,
        mark=esper.mark,
        keyring=esper.keyring,
    )
    inherited = site.environment | environment

    def starter(name: str, argv: tuple[str, ...], **more: str) -> Callable[[], Any]:
        return lambda: _start(installation.folder / f"{name}.log", argv, inherited | more)

    web = (*plan.web_command(), "--host", "127.0.0.1", "--port", str(port))
    installation.add("second web", starter("second-web", web, **wrong_clock(seconds=3600)))
    tamiyo = (*plan.tamiyo_command(), "--urza-url", installation.url)
    more = {"ESPER_TOKEN": site.token("tamiyo"), "OMP_NUM_THREADS": "1"}
    installation.add("second tamiyo", starter("second-tamiyo", tamiyo, **more))
    configuration = installation.folder / "nginx.conf"
    ports = (int(esper.url.rsplit(":", 1)[1]), port)
    configuration.write_text(
        NGINX.format(
            user="user root;" if os.getuid() == 0 else "",
            folder=installation.folder,
            port=installation.entrance,
            servers=" ".join(f"server 127.0.0.1:{port} fail_timeout=1s;" for port in ports),
        )
    )
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    installation.add("nginx", starter("nginx", (nginx, "-c", str(configuration))))


def wrong_clock(*, seconds: int) -> dict[str, str]:
    """The environment of a process whose clock is fast by so much; its stop watches are right."""
    found = importlib.util.find_spec("libfaketime")
    assert found is not None
    assert found.origin is not None
    library = Path(found.origin).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME": f"+{seconds}",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def _start(log: Path, argv: tuple[str, ...], environment: dict[str, str]) -> Any:
    with log.open("ab") as file:
        return subprocess.Popen(
            argv,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=dies_with_parent(),
        )


def add_trainers(installation: Installation, *, fake: int, real: int, harsh: bool) -> None:
    """Trainers behind the bad network; every second fake one has a wrong clock."""
    server = f"http://127.0.0.1:{installation.network.port}"
    token = installation.esper.keyring["tokens"]["trainer"]
    folder = str(installation.folder)
    for index in range(fake):
        installation.add_trainer(
            f"fake-{index}",
            fake_trainer.run_fake_trainer,
            fake_trainer.Options(
                name=f"fake-{index}",
                server=server,
                token=token,
                folder=folder,
                seed=installation.seed + index,
                crash_chance=0.02 if harsh else 0.0,
                guard_chance=0.1 if harsh else 0.0,
                remedy_steps=70 + 10 * index,
                clock_error=(0.0, 3600.0, 0.0, -3600.0)[index % 4],
            ),
        )
    for index in range(real):
        options = real_trainer.Options(
            name=f"real-{index}", server=server, token=token, folder=folder
        )
        installation.add_trainer(f"real-{index}", real_trainer.run_real_trainer, options)
