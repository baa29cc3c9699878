"""Numbers that may be unknown."""

from __future__ import annotations

import math
from typing import Any, TypeGuard


def finite_or_none(value: float | None) -> float | None:
    """Databases and JSON have no NaN: unknown is NULL."""
    return value if value is not None and math.isfinite(value) else None


def is_number(value: Any) -> TypeGuard[int | float]:
    """A JSON number: true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
