"""From typed messages to strict JSON and back: one way out and one way in for all of them.

:mod:`esper.contracts.codec` turns bytes into JSON values and refuses what is not strict JSON. This
module turns JSON values into structs and dataclasses and refuses what does not fit their types;
msgspec does the work. An error names the place of the fault as a JSON pointer (RFC 6901).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias, TypeVar

import msgspec
import numpy as np
from msgspec import Meta

from esper.contracts import codec
from esper.exceptions import CodecError, MessageError

MAX_NAME_LENGTH = 255
MAX_REASON_LENGTH = 200  # of an error: it may quote a value of any length

Int64: TypeAlias = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Whole: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_LENGTH)]
ShortText: TypeAlias = Annotated[str, Meta(max_length=MAX_NAME_LENGTH)]
Sentence: TypeAlias = Annotated[str, Meta(min_length=1, max_length=1000)]
Digest: TypeAlias = Annotated[str, Meta(max_length=64)]  # hex SHA-256, or empty
Shape: TypeAlias = Annotated[tuple[Int64, ...], Meta(max_length=16)]

_T = TypeVar("_T")
_ATTRIBUTE = re.compile(r"^ {4}(?P<names>\w+(?:, \w+)*): (?P<text>.+)$")

if TYPE_CHECKING:
    Number: TypeAlias = float
else:

    class Number(float):
        """A float that may be non-finite; in JSON a number, or "nan", "inf" or "-inf"."""

        SCHEMA: ClassVar = {
            "oneOf": [{"type": "number"}, {"type": "string", "enum": ["nan", "inf", "-inf"]}]
        }

        @classmethod
        def read(cls, value: Any) -> Number:
            try:
                return cls(codec.number_from_wire(value))
            except (CodecError, OverflowError):
                raise ValueError('Expected a number, "nan", "inf" or "-inf"') from None


def to_wire(value: Any) -> Any:
    """Structs, dataclasses, numpy numbers and non-finite floats as strict JSON values.

    Raises:
        CodecError: something in it has no JSON form.
    """
    try:
        return _finite(msgspec.to_builtins(value, enc_hook=_encode, order="deterministic"))
    except (TypeError, NotImplementedError, RecursionError) as error:
        raise CodecError(f"cannot be sent as strict JSON: {error}") from error


def from_wire(kind: type[_T], data: Any) -> _T:
    """JSON values that the codec has let in, as ``kind``.

    Nothing is converted quietly: a boolean is no number, a text is no number, 1.0 is no integer.

    Raises:
        MessageError: the data does not fit; ``pointer`` names the first place that does not.
    """
    try:
        return msgspec.convert(data, kind, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise _message_error(kind, data, error) from error


def schema_of(kind: Any) -> dict[str, Any]:
    """JSON Schema of the types that msgspec does not know; a ``schema_hook``."""
    if not hasattr(kind, "SCHEMA"):
        raise NotImplementedError(f"{kind} has no JSON form")
    schema: dict[str, Any] = kind.SCHEMA
    return schema


def introduction(kind: type) -> str:
    """What a message is, from its docstring, without its members."""
    return inspect.cleandoc(kind.__doc__ or "").partition("\n\nAttributes:")[0]


def meanings(kind: type) -> dict[str, str]:
    """Member -> what it means, from the ``Attributes`` of the docstrings of it and its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        found |= _attributes(inspect.cleandoc(base.__doc__ or ""))
    return found


def _attributes(docstring: str) -> dict[str, str]:
    _, _, section = docstring.partition("\nAttributes:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.split("\n"):
        match = _ATTRIBUTE.match(line)
        if match:
            names = match["names"].split(", ")
            found |= dict.fromkeys(names, match["text"])
        elif line.startswith("        ") and names:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            break
    return found


def _encode(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return codec.number_to_wire(float(value))
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, str):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} has no JSON form")


def _decode(kind: Any, value: Any) -> Any:
    return kind.read(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return codec.number_to_wire(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


# --- where the fault is ---------------------------------------------------------------------------

_PLACE = " - at "
_STEP = re.compile(r"\.(?P<member>\w+)|\[(?P<index>\d+)\]|(?P<any>\[\.\.\.\])")
_MISSING = re.compile(r"Object missing required field `(\w+)`$")
_Pointer = list[str | int]


def _message_error(kind: Any, data: Any, error: msgspec.ValidationError) -> MessageError:
    what, path = _split(str(error))
    pointer = _pointer(kind, data, path)
    text = "".join(f"/{_escaped(step)}" for step in pointer)
    if isinstance(error.__cause__, MessageError):  # of a __post_init__, which knows the member
        return MessageError(error.__cause__.reason, pointer=text + error.__cause__.pointer)
    missing = _MISSING.match(what)
    if missing:
        text += f"/{missing[1]}"
    return MessageError(what[:MAX_REASON_LENGTH], pointer=text)


def _escaped(step: str | int) -> str:
    return str(step).replace("~", "~0").replace("/", "~1")


def _split(message: str) -> tuple[str, str]:
    """``Expected `int` - at `$.frames[0].step` `` -> what is wrong, and msgspec's path to it."""
    what, found, place = message.rpartition(_PLACE)
    if not found:
        return message, ""
    return what, place.removeprefix("`key` in ").strip("`").removeprefix("$")


def _pointer(kind: Any, data: Any, path: str) -> _Pointer:
    pointer: _Pointer = []
    for step in _STEP.finditer(path):
        if step["member"]:
            pointer.append(step["member"])
        elif step["index"]:
            pointer.append(int(step["index"]))
        else:  # "[...]": msgspec does not say which value of a mapping it was
            key = _wrong_key(kind, data, pointer, path[: step.end()])
            if key is None:
                break
            pointer.append(key)
    return pointer


def _wrong_key(kind: Any, data: Any, pointer: _Pointer, path: str) -> str | None:
    """The first key of the mapping at ``pointer`` whose value does not fit; by bisection."""
    mapping = data
    for step in pointer:
        mapping = mapping[step]
    if not isinstance(mapping, Mapping):
        return None
    keys = list(mapping)
    while len(keys) > 1:
        half = keys[: len(keys) // 2]
        part = _replaced(data, pointer, {key: mapping[key] for key in half})
        keys = half if _fails_at(kind, part, path) else keys[len(half) :]
    return keys[0] if keys else None


def _fails_at(kind: Any, data: Any, path: str) -> bool:
    try:
        msgspec.convert(data, kind, dec_hook=_decode)
    except msgspec.ValidationError as error:
        return _split(str(error))[1].startswith(path)
    return False


def _replaced(data: Any, pointer: _Pointer, value: Any) -> Any:
    if not pointer:
        return value
    step, rest = pointer[0], pointer[1:]
    copied = dict(data) if isinstance(data, Mapping) else list(data)
    copied[step] = _replaced(data[step], rest, value)  # type: ignore[index]  # it led here
    return copied
