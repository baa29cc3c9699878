"""Another Python process of these tests, with this tree's code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from hosts.paths import ROOT

# So that a broken test ends. Generous: a busy machine is no fault of the code.
LIMIT_SECONDS = 600.0


def python(
    *words: str, cwd: Path = ROOT, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs ``python words…`` to its end, and says what it printed and how it ended.

    Args:
        environment: all of it; None: that of this process.
    """
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**(os.environ if environment is None else environment), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


def esper(
    *words: str, cwd: Path = ROOT, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """As :func:`python`, for ``esper words…``."""
    return python("-m", "launcher", *words, cwd=cwd, environment=environment)
