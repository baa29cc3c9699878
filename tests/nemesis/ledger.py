"""What a trainer under test writes of itself: one JSON line for each thing that it did.

The checker compares it with the server. A line is written with one ``write``, in the order of the
acts, so that it survives a kill at any moment after it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

true_time = time.time  # a trainer with a wrong clock replaces ``time.time``


class Ledger:
    """Appends to ``path``."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, event: str, **members: Any) -> None:
        line = json.dumps({"at": true_time(), "event": event, **members}) + "\n"
        os.write(self._file, line.encode())


def read_ledger(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a ledger; the last one may be cut off."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
