"""The one codec for REST, websockets and Redis: strict JSON.

Python's own ``json`` accepts ``NaN``, ``Infinity``, ``1e999`` (as infinity), duplicate keys and any
depth; a browser's ``JSON.parse`` then fails on what the server sends. A diverged loss is a legal
event: :func:`number_to_wire` sends it as text ("nan"), never as a number.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from esper.exceptions import CodecError

MAX_DEPTH = 32
MAX_BYTES = 1 << 20
# Possessive, and the closing quote is optional: otherwise a megabyte of escaped quotes is scanned
# again from each quote, which blocks the process for hours.
_TEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, UTF-8, finite numbers only.

    Raises:
        CodecError: a number is not finite, or a value is not JSON.
    """
    try:
        text = json.dumps(
            value, allow_nan=False, sort_keys=True, separators=(",", ":"), ensure_ascii=False
        )
        return text.encode("utf-8")
    except (ValueError, TypeError, RecursionError) as error:
        raise CodecError(f"cannot be sent as strict JSON: {error}") from error


def decode(raw: bytes | str, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH) -> Any:
    """Strict inverse of :func:`encode`.

    Raises:
        CodecError: too large, too deep, not UTF-8, not JSON, a duplicate key, a NUL or lone
            surrogate in a text, or a number that is not finite.
    """
    data = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    if len(data) > max_bytes:
        raise CodecError(f"{len(data)} bytes are too many; at most {max_bytes} are accepted")
    _check_depth(data, max_depth)
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_bounded_int,
        )
    except CodecError:
        raise
    except (ValueError, RecursionError) as error:
        raise CodecError(f"not JSON: {error}") from error
    # Escapes can encode what raw UTF-8 cannot: NUL and lone surrogates, which databases refuse.
    if b"\\u0000" in data or b"\\ud" in data.lower():
        _check_texts(value)
    return value


def number_to_wire(value: float) -> float | str:
    """A float for JSON: itself, or "nan" / "inf" / "-inf"."""
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return "nan"
    return "inf" if value > 0 else "-inf"


def number_from_wire(value: Any) -> float:
    """Inverse of :func:`number_to_wire`; booleans and other texts are refused."""
    if isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CodecError(f"not a number: {value!r}")
    return float(value)


def _check_depth(data: bytes, max_depth: int) -> None:
    # Before parsing, because a recursive parser fails on deep input. Brackets in texts do not
    # count.
    depth = 0
    for bracket in _BRACKET.finditer(_TEXT.sub(b"", data)):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > max_depth:
            raise CodecError(f"nested deeper than {max_depth} levels")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise CodecError(f"key {twice!r} occurs twice in one object")
    return found


def _refuse_constant(name: str) -> Any:
    raise CodecError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise CodecError(f"{text[:20]} does not fit a double")
    return value


def _bounded_int(text: str) -> int:
    if len(text) > 19:
        raise CodecError(f"{text[:20]}… does not fit 64 bits")
    return int(text)


def _check_texts(value: Any) -> None:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            if "\x00" in item:
                raise CodecError("a text contains a NUL character")
            try:
                item.encode("utf-8")
            except UnicodeEncodeError as error:
                raise CodecError("a text contains a lone surrogate") from error
        elif isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
