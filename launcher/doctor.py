"""``esper doctor``: what this machine has and lacks, in words.

Each finding is fine, or a note (Esper runs without it), or missing and required.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from hosts.disk import free_mib, nearest_existing, why_full
from hosts.runtime import DEFAULT_REDIS_PORT
from launcher.supervisor.esper import DEFAULT_PORT
from launcher.supervisor.ports import is_free
from launcher.supervisor.valkey import ValkeyMissingError, valkey_program

MINIMUM_PYTHON = (3, 11)
REQUIRED_DISK_MIB, WANTED_DISK_MIB = 500, 5000
WANTED_SHARED_MEMORY_MIB = 64
CLOCK_TOLERANCE_SECONDS = 60.0
# torch in a process of its own: it takes seconds, and a broken one may end the process.
TORCH_PROGRAM = """
import torch
from esper.compilation.key import capabilities
print(torch.__version__, ",".join(capabilities()), sep="|")
"""


class Result(StrEnum):
    """How much a finding matters."""

    FINE = "ok"
    NOTE = "note"  # Esper runs, with less
    MISSING = "MISSING"  # Esper does not run


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    result: Result
    name: str
    text: str


def examine(data_dir: Path) -> Iterator[Finding]:
    """All findings, in the order in which Esper needs the things."""
    yield check_python()
    yield check_torch()
    yield check_data_directory(data_dir)
    yield check_disk(data_dir)
    yield check_web_port()
    yield check_redis()
    yield check_database()
    yield check_shared_memory(Path("/dev/shm"))  # noqa: S108 (only measured)
    yield check_compiler(shutil.which)
    yield check_clock(time.time())


def check_python() -> Finding:
    version = platform.python_version()
    if sys.version_info < MINIMUM_PYTHON:
        return Finding(Result.MISSING, "Python", f"{version}; Esper needs 3.11 or newer")
    return Finding(Result.FINE, "Python", version)


def check_torch() -> Finding:
    answer = subprocess.run(
        [sys.executable, "-c", TORCH_PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    if answer.returncode != 0:
        last = answer.stderr.strip().splitlines()[-1:] or ["no message"]
        return Finding(Result.MISSING, "torch", f"it cannot be imported: {last[0]}")
    version, _, devices = answer.stdout.strip().partition("|")
    if devices == "cpu":
        return Finding(Result.FINE, "torch", f"{version}, on the CPU; no GPU was found")
    return Finding(Result.FINE, "torch", f"{version}, devices: {devices}")


def check_data_directory(directory: Path) -> Finding:
    """Whether a file can be written there, or the directory can be made."""
    existing = nearest_existing(directory)
    try:
        with tempfile.TemporaryFile(dir=existing, buffering=0) as file:
            file.write(b"\0" * 4096)  # a full disk takes the name of a file, not its content
    except OSError as error:
        text = f"{directory} cannot be written: {error.strerror}; choose another with --data-dir"
        return Finding(Result.MISSING, "data", text)
    return Finding(Result.FINE, "data", f"{directory} can be written")


def check_disk(directory: Path) -> Finding:
    if full := why_full(directory):
        return Finding(Result.MISSING, "disk", full)
    free = free_mib(directory)
    text = f"{free} MiB free for {directory}"
    if free < REQUIRED_DISK_MIB:
        return Finding(Result.MISSING, "disk", f"{text}; Esper needs {REQUIRED_DISK_MIB} MiB")
    if free < WANTED_DISK_MIB:
        return Finding(Result.NOTE, "disk", f"{text}; the kernel cache may take 4096 MiB")
    return Finding(Result.FINE, "disk", text)


def check_web_port(port: int = DEFAULT_PORT) -> Finding:
    if is_free(port):
        return Finding(Result.FINE, "port", f"{port} is free")
    text = f"{port} is taken; esper up uses the next free port, or the one of --port"
    return Finding(Result.NOTE, "port", text)


def check_redis() -> Finding:
    """Redis by URL must answer; without a URL there must be a program to start."""
    if url := os.environ.get("REDIS_URL"):
        return _check_reachable("Redis", "REDIS_URL", url, default_port=6379)
    try:
        program = valkey_program()
    except ValkeyMissingError as error:
        return Finding(Result.MISSING, "Valkey", str(error))
    taken = "" if is_free(DEFAULT_REDIS_PORT) else f"; port {DEFAULT_REDIS_PORT} is taken"
    return Finding(Result.FINE, "Valkey", f"{program}{taken}")


def check_database() -> Finding:
    url = os.environ.get("DATABASE_URL", "")
    if not url or url.startswith("sqlite:"):
        return Finding(Result.FINE, "database", "SQLite")
    return _check_reachable("PostgreSQL", "DATABASE_URL", url, default_port=5432)


def _check_reachable(name: str, variable: str, url: str, *, default_port: int) -> Finding:
    """A TCP connection. The finding does not contain the URL, which holds a password."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "127.0.0.1", parts.port or default_port
    except ValueError:
        return Finding(Result.MISSING, name, f"{variable} is not a URL")
    try:
        with socket.create_connection((host, port), timeout=5):
            pass
    except OSError as error:
        why = error.strerror or "it does not answer within 5 s"
        return Finding(Result.MISSING, name, f"{host}:{port} cannot be reached: {why} ({variable})")
    return Finding(Result.FINE, name, f"{host}:{port} answers")


def check_shared_memory(directory: Path) -> Finding:
    """Data loaders and distributed training pass tensors there; containers often have 64 MiB."""
    if not directory.is_dir():
        return Finding(Result.NOTE, "shared memory", f"there is no {directory}")
    free = shutil.disk_usage(directory).free // 2**20
    if free < WANTED_SHARED_MEMORY_MIB:
        text = f"{free} MiB free in {directory}; trainers with data loader workers may fail"
        return Finding(Result.NOTE, "shared memory", text)
    return Finding(Result.FINE, "shared memory", f"{free} MiB free in {directory}")


def check_compiler(which: Callable[[str], str | None]) -> Finding:
    """Tier 1 compiles grafts to machine code; without a compiler they stay eager."""
    given = os.environ.get("CXX")
    for name in (*([given] if given else []), "g++", "clang++", "c++"):
        if found := which(name):
            return Finding(Result.FINE, "compiler", found)
    text = "no C++ compiler; grafts run, but none is compiled to machine code (tier 1)"
    return Finding(Result.NOTE, "compiler", text)


def check_clock(now: float) -> Finding:
    """Commands expire, so a wrong clock refuses them. A clock before our own files is wrong."""
    shown = f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M:%S} UTC"
    if now < Path(__file__).stat().st_mtime - CLOCK_TOLERANCE_SECONDS:
        text = f"{shown} is before the installation of Esper; set the clock"
        return Finding(Result.MISSING, "clock", text)
    return Finding(Result.FINE, "clock", shown)
