"""Closed cases of local runs, kept in a file between them.

The file is named by ``ESPER_EXPERIENCE``; without it a local run knows its own cases only. A file
that cannot be read or written is said in the log and changes nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esper.contracts import Experience

logger = logging.getLogger("esper")

VARIABLE = "ESPER_EXPERIENCE"


def read_experience() -> dict[str, Experience]:
    """By blueprint; empty without a file, or where it cannot be read."""
    path = _path()
    if path is None or not path.exists():
        return {}
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(slug): Experience(int(one["kept"]), int(one["rolled_back"]), _number(one["reward"]))
            for slug, one in stored.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("the closed cases in %s cannot be read: %s", path, error)
        return {}


def keep_case(blueprint: str, *, kept: bool, reward: float) -> None:
    """Adds one case to the file, which other runs may have written meanwhile."""
    _rewrite(blueprint, lambda seen: with_case(seen, kept, reward))


def keep_change(blueprint: str, *, lost: bool, difference: float) -> None:
    """As :func:`with_change`, in the file."""
    _rewrite(blueprint, lambda seen: with_change(seen, lost, difference))


def _rewrite(blueprint: str, change: Callable[[Experience], Experience]) -> None:
    path = _path()
    if path is None:
        return
    cases = read_experience()
    cases[blueprint] = change(cases.get(blueprint, Experience()))
    stored = {
        slug: {
            "kept": int(one.kept),
            "rolled_back": int(one.rolled_back),
            "reward": one.mean_reward if math.isfinite(one.mean_reward) else None,
        }
        for slug, one in sorted(cases.items())
    }
    try:
        _write(path, json.dumps(stored, indent=1) + "\n")
    except OSError as error:
        logger.warning("a closed case cannot be kept in %s: %s", path, error)


def with_case(seen: Experience, keep: bool, reward: float) -> Experience:
    """One more case, with the mean of the rewards."""
    total = seen.cases * seen.mean_reward if seen.cases else 0.0
    return Experience(
        kept=seen.kept + keep,
        rolled_back=seen.rolled_back + (not keep),
        mean_reward=(total + reward) / (seen.cases + 1),
    )


def with_change(seen: Experience, lost: bool, difference: float) -> Experience:
    """One of the cases that were kept has another reward by now.

    Args:
        lost: it is out of the model.
        difference: the new reward minus the old one.
    """
    if not seen.kept:
        return seen  # it is not among them
    return Experience(
        kept=seen.kept - lost,
        rolled_back=seen.rolled_back + lost,
        mean_reward=seen.mean_reward + difference / seen.cases,
    )


def _path() -> Path | None:
    named = os.environ.get(VARIABLE, "").strip()
    return Path(named).expanduser() if named else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
