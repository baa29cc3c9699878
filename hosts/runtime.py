"""The lock on a data directory, and ``runtime.json``: what runs on it right now."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hosts.keyring import write_private

DEFAULT_REDIS_PORT = 6390
RUNTIME_FILE = "runtime.json"
LOCK_FILE = "lock"


class DataDirectoryBusyError(Exception):
    """Another supervisor uses this data directory."""


@contextmanager
def data_directory_lock(data_dir: Path) -> Iterator[None]:
    """Locks the directory: two supervisors must not use the same SQLite and Valkey files.

    Raises:
        DataDirectoryBusyError: another process holds the lock.
    """
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (data_dir / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise DataDirectoryBusyError(
                f"Esper already runs on {data_dir} (process {owner}). Stop it first, or choose "
                "another directory with --data-dir."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def write_runtime(data_dir: Path, state: dict[str, Any]) -> None:
    """Records what runs.

    ``id, pid, url, redis_port, ready, children {name: pid}``, and of each child that cannot be kept
    running ``down {name: {since, ends, why, tail}}``.
    """
    write_private(data_dir / RUNTIME_FILE, json.dumps(state, indent=2) + "\n")


def read_runtime(data_dir: Path) -> dict[str, Any]:
    """What runs, or ran when its supervisor was killed; empty after an orderly stop."""
    try:
        state: dict[str, Any] = json.loads((data_dir / RUNTIME_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return state


def remove_runtime(data_dir: Path) -> None:
    """Records that nothing runs."""
    (data_dir / RUNTIME_FILE).unlink(missing_ok=True)


def running_redis_port(data_dir: Path) -> int | None:
    """The port of this directory's Valkey, for commands beside a running Esper."""
    port = read_runtime(data_dir).get("redis_port")
    return port if isinstance(port, int) else None
