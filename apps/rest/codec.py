"""REST bodies through Esper's one strict codec."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import IO, Any

from rest_framework.parsers import BaseParser
from rest_framework.renderers import BaseRenderer

from apps.rest.etag import EncodedResponse
from apps.rest.problems import Problem
from esper.contracts import codec, telemetry_body
from esper.exceptions import CodecError

log = logging.getLogger(__name__)


class StrictJSONParser(BaseParser):
    """Refuses what ``esper.contracts.codec`` refuses: NaN, depth, size, duplicate keys."""

    media_type = "application/json"

    def parse(
        self,
        stream: IO[Any],
        media_type: str | None = None,
        parser_context: Mapping[str, Any] | None = None,
    ) -> Any:
        raw = stream.read(codec.MAX_BYTES + 1)
        if len(raw) > codec.MAX_BYTES:
            raise Problem(413, "too-large", f"The body may have at most {codec.MAX_BYTES} bytes.")
        value = codec.decode(raw) if raw else {}
        if not isinstance(value, dict):
            raise Problem(400, "invalid", "The body must be a JSON object.")
        return value


class TelemetryParser(BaseParser):
    """``esper.contracts.telemetry_body``: the JSON part is as strict, the values are bytes."""

    media_type = telemetry_body.MEDIA_TYPE

    def parse(
        self,
        stream: IO[Any],
        media_type: str | None = None,
        parser_context: Mapping[str, Any] | None = None,
    ) -> Any:
        raw = stream.read(telemetry_body.MAX_BYTES + 1)
        if len(raw) > telemetry_body.MAX_BYTES:
            most = telemetry_body.MAX_BYTES
            raise Problem(413, "too-large", f"The body may have at most {most} bytes.")
        return telemetry_body.decode_body(raw)


class StrictJSONRenderer(BaseRenderer):
    """Canonical JSON that every browser can read."""

    media_type = "application/json"
    format = "json"
    charset = None  # JSON is UTF-8 by definition
    render_style = "text"

    def render(
        self,
        data: Any,
        accepted_media_type: str | None = None,
        renderer_context: Mapping[str, Any] | None = None,
    ) -> bytes:
        if data is None:
            return b""
        response = (renderer_context or {}).get("response")
        if isinstance(response, EncodedResponse) and response.encoded_data is data:
            return response.encoded
        try:
            return codec.encode(data)
        except CodecError:
            # A stored number that is unexpectedly not finite must not become an error 500.
            log.exception("an answer contained a number that is not finite")
            return codec.encode(_finite(data))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return codec.number_to_wire(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
