"""What a remedy with its settings would do, in words. The remedies are in ``esper.remedies``."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from typing import Any

NEWEST = -1  # of a step: the youngest good state
MARKED = -2  # of a step: the state in which the first remedy for a fault was given


def in_words(phrase: str, config: Mapping[str, Any]) -> str:
    """``phrase`` with the settings in it, such as "rewind to step 5,800 and halve the rate".

    Args:
        phrase: a format string. ``{factor:rate}`` says what a factor does to the learning rate,
            ``{step:state}`` names a good state.
        config: every setting of the remedy.
    """
    words = _Words().vformat(phrase, (), config)
    return words[:1].upper() + words[1:]


class _Words(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if format_spec in _WORDS:
            return _WORDS[format_spec](value)
        return str(super().format_field(value, format_spec))


def _rate(factor: float) -> str:
    if factor == 1:
        return "keep the learning rate"
    if factor in _VERBS:
        return f"{_VERBS[factor]} the learning rate"
    if 0 < factor < 0.5:
        times = 1 / factor
        return f"divide the learning rate by {f'{times:.3g}' if times < 100 else f'{times:,.0f}'}"
    return f"multiply the learning rate by {factor:.3g}"


def _state(step: int) -> str:
    named = {NEWEST: "the youngest good state", MARKED: "where the first remedy was given"}
    return named.get(step) or f"step {step:,}"


_VERBS = {0.5: "halve", 2.0: "double"}
_WORDS: dict[str, Callable[[Any], str]] = {"rate": _rate, "state": _state}
