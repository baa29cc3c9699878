"""A temporary PostgreSQL for tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

NO_POSTGRES = (
    "This test needs PostgreSQL, and there is none: no initdb on PATH or under "
    "/usr/lib/postgresql. Install Debian's package postgresql (./check does, where it is root)."
)


def postgres_programs() -> Path | None:
    newest_first = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    found = newest_first[0] if newest_first else shutil.which("initdb")
    return Path(found).parent if found else None


@dataclass
class Cluster:
    """A cluster in ``base``, which listens on loopback and trusts every connection."""

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
            "-c fsync=off -c autovacuum=off -c shared_buffers=32MB -c max_connections=100"
        )
        log = data / "server.log"
        self._run("pg_ctl", "-D", str(data), "-o", options, "-l", str(log), "-w", "start")

    def restart(self) -> None:
        """As after a crash: nothing is written out before, and every connection is lost."""
        self._run("pg_ctl", "-D", str(self.base / "data"), "-m", "immediate", "-w", "restart")

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
            timeout=600,
        )
