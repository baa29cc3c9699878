"""Numbers that may be unknown."""

from __future__ import annotations

import math


def finite_or_none(value: float | None) -> float | None:
    """Databases and JSON have no NaN: unknown is NULL."""
    return value if value is not None and math.isfinite(value) else None
