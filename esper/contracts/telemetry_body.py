"""A batch of telemetry as bytes: strict JSON for what varies, raw float32 for the frames.

::

    length of the JSON: 4 bytes, little-endian │ JSON │ values of frame 1 │ values of frame 2 │ …

The JSON is :class:`esper.contracts.protocol.Telemetry` whose frames have no ``values``; the bytes
after it are those values, equally many for each frame. Base64 in JSON is a third longer, and costs
the server ten times as much to read as the storing of the batch.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from esper.contracts import codec
from esper.exceptions import CodecError

MEDIA_TYPE = "application/vnd.esper.telemetry"
MAX_BYTES = 2 * 1024 * 1024  # of the whole body

_LENGTH = struct.Struct("<I")


def encode_body(members: dict[str, Any], values: Sequence[bytes]) -> bytes:
    """The body of a batch.

    Args:
        members: of ``Telemetry`` as strict JSON, its frames without ``values``.
        values: of each frame, little-endian float32 [layers, signals].

    Raises:
        CodecError: the members are not strict JSON.
    """
    text = codec.encode(members)
    return b"".join((_LENGTH.pack(len(text)), text, *values))


def decode_body(raw: bytes) -> dict[str, Any]:
    """The members of a batch; each of its frames has its ``values`` as bytes.

    Raises:
        CodecError: too large, cut off, not strict JSON, or not equally many bytes for each frame.
    """
    if len(raw) > MAX_BYTES:
        raise CodecError(f"{len(raw)} bytes are too many; at most {MAX_BYTES} are accepted")
    if len(raw) < _LENGTH.size:
        raise CodecError("the body is cut off before its JSON")
    (length,) = _LENGTH.unpack_from(raw)
    begin = _LENGTH.size + length
    if begin > len(raw):
        raise CodecError(f"the body is cut off within its JSON of {length} bytes")
    members = codec.decode(raw[_LENGTH.size : begin])
    frames = members.get("frames", []) if isinstance(members, dict) else None
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise CodecError("the JSON must be an object whose frames are a list of objects")
    _insert_values(frames, memoryview(raw)[begin:])
    result: dict[str, Any] = members
    return result


def _insert_values(frames: list[dict[str, Any]], values: memoryview) -> None:
    size, rest = divmod(len(values), len(frames)) if frames else (0, len(values))
    if rest:
        raise CodecError(f"{len(values)} bytes of values cannot be those of {len(frames)} frames")
    for index, frame in enumerate(frames):
        frame["values"] = bytes(values[index * size : (index + 1) * size])
