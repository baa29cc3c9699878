"""Esper's real processes for a benchmark, in a temporary directory, and what they cost."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hosts.keyring import read_keyring
from hosts.runtime import read_runtime
from launcher.supervisor.ports import any_free_port

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Installation:
    """What ``esper up --no-demo`` has started."""

    data_dir: Path
    url: str

    def token(self, service: str) -> str:
        return str(read_keyring(self.data_dir)["tokens"][service])

    def password(self, person: str) -> str:
        return str(read_keyring(self.data_dir)["people"][person]["password"])

    @property
    def redis_url(self) -> str:
        password = read_keyring(self.data_dir)["redis_password"]
        return f"redis://:{password}@127.0.0.1:{read_runtime(self.data_dir)['redis_port']}/0"

    @property
    def database(self) -> Path:
        return self.data_dir / "esper.sqlite3"

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time of each child process with its own children, by its name."""
        children: dict[str, int] = read_runtime(self.data_dir)["children"]
        return {name: cpu_seconds(pid) for name, pid in children.items()}

    def resident_mib(self, child: str) -> float:
        """Memory of one child process."""
        pid = read_runtime(self.data_dir)["children"][child]
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def installation() -> Iterator[Installation]:
    """Starts one, and stops it at the end; raises ``RuntimeError`` when it does not start."""
    with tempfile.TemporaryDirectory(prefix="esper-benchmark-") as name:
        data_dir = Path(name)
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "launcher", "up", "--no-demo"),
                *("--port", "0", "--data-dir", str(data_dir)),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            yield Installation(data_dir, _wait_for_url(process))
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=30)  # also reads the output, so that it can end
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def _wait_for_url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "Esper is at " in line:
            return line.split("Esper is at ")[1].split()[0]
    raise RuntimeError("Esper did not start:\n" + "".join(seen[-20:]))


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and all its descendants so far; 0 once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    own = sum(int(ticks) for ticks in fields[11:15]) / _TICKS  # its own and its ended children's
    return own + sum(cpu_seconds(int(child)) for child in children)


def machine() -> str:
    """The machine in one line, with its load: absolute figures mean nothing without them."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else ""
    load = os.getloadavg()[0]
    return (
        f"{model or platform.machine()}, {os.cpu_count()} cores, load {load:.1f}; "
        f"Python {platform.python_version()}"
    )


@contextmanager
def postgresql() -> Iterator[str | None]:
    """The URL of a temporary PostgreSQL that writes to disk; None where none is installed."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    found = programs[0] if programs else shutil.which("initdb")
    if not found:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="esper-postgresql-") as name:
        base = Path(name)
        base.chmod(0o755)
        data = base / "data"
        data.mkdir()
        if os.getuid() == 0:
            shutil.chown(data, "postgres")
        control = Path(found).parent
        _as_postgres(control / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N")
        port = any_free_port()
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''"
        log = data / "server.log"
        _as_postgres(control / "pg_ctl", "-D", data, "-o", options, "-l", log, "-w", "start")
        try:
            yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
        finally:
            _as_postgres(control / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")


def _as_postgres(program: Path, *arguments: object) -> None:
    # PostgreSQL refuses to run as root.
    who = ("runuser", "-u", "postgres", "--") if os.getuid() == 0 else ()
    command = [*who, str(program), *(str(argument) for argument in arguments)]
    subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL, timeout=600)
