"""A share as people read it."""

from __future__ import annotations


def percent(share: float) -> str:
    """With at most two digits, by its size: 87%, 8.7%, 0.87%; near 100%, one more: 99.7%."""
    return _written(share, "")


def signed(share: float) -> str:
    """As :func:`percent`, with its sign: +8.7%."""
    return _written(share, "+")


def _written(share: float, sign: str) -> str:
    value = abs(100 * share)
    if value >= 10:
        decimals = 1 if 99 < value < 100 else 0
    else:
        decimals = next((n for n, least in enumerate((10, 1, 0.1)) if value >= least), 3)
    rounded = round(100 * share, decimals)
    return f"{rounded:{sign}g}%" if rounded else "0%"
