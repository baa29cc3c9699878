"""How much memory the snapshots of a run may take."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

from esper.exceptions import ConfigurationError

VARIABLE = "ESPER_SNAPSHOT_MEMORY_GIB"
FOLDER_VARIABLE = "ESPER_SNAPSHOT_FOLDER"
GIB = 1 << 30
SHARE = 0.25  # of the machine's memory
_UNKNOWN_MEMORY_BYTES = 16 * GIB
# Limit of a container, of version 2 and of version 1 of control groups.
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def snapshot_limit(gib: float | None) -> int:
    """The limit in bytes: ``gib``, else the environment's, else a quarter of the memory.

    Raises:
        ConfigurationError: it is no number of 0 or more.
    """
    given = os.environ.get(VARIABLE) if gib is None else gib
    if given is None or given == "":
        return int(SHARE * memory_bytes())
    try:
        wanted = float(given)
    except (TypeError, ValueError):
        wanted = math.nan
    if isinstance(given, bool) or not wanted >= 0:
        name = VARIABLE if gib is None else "snapshot_memory"
        raise ConfigurationError(f"{name} must be a number of GiB, 0 or more, got {given!r}")
    return int(min(wanted, 1e6) * GIB)


def folder_for_snapshots(folder: str | Path | None) -> Path | None:
    """The folder, else the environment's; it is made where it is missing.

    Raises:
        ConfigurationError: it cannot be made.
    """
    given = os.environ.get(FOLDER_VARIABLE) if folder is None else folder
    if given is None or given == "":
        return None
    found = Path(given).absolute()  # the script may change its directory later
    try:
        found.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"the folder for snapshots cannot be made: {error}") from error
    return found


def memory_bytes() -> int:
    """Memory of this machine, or of the container."""
    found = [_UNKNOWN_MEMORY_BYTES]
    with suppress(ValueError, OSError, AttributeError):
        found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CONTAINER_LIMITS:
        with suppress(OSError, ValueError):
            found.append(int(Path(path).read_text()))
    return min(found)
