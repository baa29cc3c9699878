"""What a mistyped name was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_MOST_SHOWN = 8


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'fc2'?)"``, empty where nothing is near.

    Args:
        name: as it was typed.
        known: the names that there are.
    """
    names = dict.fromkeys(str(entry) for entry in known if entry)
    lowered = {entry.lower(): entry for entry in names}
    near = [lowered[key] for key in get_close_matches(name.lower(), lowered, n=3, cutoff=0.6)]
    # A layer is often named without the modules around it: "fc2" for "encoder.fc2".
    tail = name.lower().rpartition(".")[2]
    inner = [entry for entry in names if entry.lower().rpartition(".")[2] == tail]
    found = list(dict.fromkeys([*near, *inner[:3]]))[:3]
    *others, last = ["", *map(repr, found)]
    several = f"{', '.join(others[1:])} or {last}" if others[1:] else last
    return f" (did you mean {several}?)" if found else ""


def or_known(name: str, known: Iterable[str]) -> str:
    """As :func:`did_you_mean`; where nothing is near, the first names that there are."""
    names = [entry for entry in dict.fromkeys(known) if entry]
    near = did_you_mean(name, names)
    if near or not names:
        return near
    rest = len(names) - _MOST_SHOWN
    more = f" and {rest} more" if rest > 0 else ""
    return f"; there are {', '.join(map(repr, names[:_MOST_SHOWN]))}{more}"
