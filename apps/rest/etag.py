"""Versions on the wire: ``ETag``, ``If-Match``, ``If-None-Match``."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from rest_framework.request import Request
from rest_framework.response import Response

from apps.rest.problems import Problem
from esper.contracts import codec
from esper.exceptions import CodecError

# The version; the tag of an answer that was read may end in a hash of its content.
VERSION_PATTERN = r'"?(\d{1,9})(?:-[0-9a-f]{1,64})?"?'
_VERSION = re.compile(VERSION_PATTERN, re.ASCII)


class EncodedResponse(Response):
    """An answer whose content is encoded already; large ones must not be encoded twice.

    ``encoded`` is of ``encoded_data`` alone: ``?fields=`` puts other data in its place later.
    """

    def __init__(self, data: Any, encoded: bytes, *, headers: dict[str, str]) -> None:
        super().__init__(data, headers=headers)
        self.encoded_data, self.encoded = data, encoded


def versioned_response(data: Any, version: int, *, status: int = 200) -> Response:
    """An answer whose ``ETag`` is the resource's version, for a later ``If-Match``."""
    return Response(data, status=status, headers={"ETag": f'"{version}"'})


def cacheable_response(request: Request, data: Any, *, version: int | None = None) -> Response:
    """An answer with the hash of its content as ``ETag``; 304 when the caller already has it.

    Args:
        version: of the resource; it is put before the hash, so that the tag serves as a later
            ``If-Match`` too, whatever else of the content has moved on.
    """
    prefix = "" if version is None else f"{version}-"
    try:
        content = codec.encode(data)
    except CodecError:  # a number that is not finite; the renderer reports and replaces it
        return Response(data)
    tag = f'"{prefix}{hashlib.sha256(content).hexdigest()[:32]}"'
    held = {part.strip() for part in request.headers.get("If-None-Match", "").split(",")}
    headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if tag in held or "*" in held:
        return Response(status=304, headers=headers)
    return EncodedResponse(data, content, headers=headers)


def required_version(version: int | None) -> int:
    """The version that ``If-Match`` gave; services call it once the caller's rights are checked.

    Raises:
        Problem: 428 when the header was missing.
    """
    if version is None:
        raise Problem(
            428,
            "precondition-required",
            "The header If-Match is missing. Send the ETag that you have read, so that a change "
            "in between is noticed.",
        )
    return version


def given_version(request: Request) -> int | None:
    """The version in ``If-Match``, None without one; raises ``Problem`` 400 for a malformed one."""
    header = request.headers.get("If-Match", "").strip()
    if not header:
        return None
    match = _VERSION.fullmatch(header)
    if match is None:
        raise Problem(400, "invalid", 'If-Match must be an ETag of this resource, such as "3".')
    return int(match[1])
