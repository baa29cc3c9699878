"""Browsers' sockets: only pages of this server may open one with the session's cookie.

Channels' ``AllowedHostsOriginValidator`` compares host names only, so that a page of another port
or scheme of the same host could read the stream of whoever is signed in.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from channels.generic.websocket import AsyncWebsocketConsumer
from django.conf import settings
from django.http.request import split_domain_port, validate_host

_DEFAULT_PORTS = {"http": 80, "https": 443}
_SCHEMES = {"ws": "http", "wss": "https"}
_Origin = tuple[str, str, int]


class _Refusal(AsyncWebsocketConsumer):
    async def connect(self) -> None:
        """Answers 403 to the handshake."""
        await self.close()


_refuse: Any = _Refusal.as_asgi()


class SameOrigin:
    """Refuses a handshake whose ``Origin`` differs in scheme, host or port.

    The server's own origin is that of the request, as for Django's CSRF check; further ones stand
    in ``CSRF_TRUSTED_ORIGINS``.
    """

    def __init__(self, application: Any) -> None:
        self.application = application

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        allowed = is_own(scope) if scope["type"] == "websocket" else True
        await (self.application if allowed else _refuse)(scope, receive, send)


def is_own(scope: Any) -> bool:
    """Whether the handshake comes from a page of this server."""
    given = [value for name, value in scope["headers"] if name == b"origin"]
    if len(given) != 1:
        return False
    origin = _origin(given[0].decode("latin-1"))
    return origin is not None and (origin == _own(scope) or origin in _trusted())


def _own(scope: Any) -> _Origin | None:
    """Where the request was sent: by its ``Host``, and by its scheme as the proxy names it."""
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    host = headers.get(b"host", "")
    if not validate_host(split_domain_port(host)[0], settings.ALLOWED_HOSTS):
        return None
    return _origin(f"{_scheme(scope, headers)}://{host}")


def _scheme(scope: Any, headers: dict[bytes, str]) -> str:
    if settings.SECURE_PROXY_SSL_HEADER:
        name, secure = settings.SECURE_PROXY_SSL_HEADER
        given = headers.get(name.removeprefix("HTTP_").replace("_", "-").lower().encode())
        if given is not None:
            return "https" if given == secure else "http"
    return _SCHEMES.get(scope.get("scheme", "ws"), "http")


def _trusted() -> set[_Origin | None]:
    return {_origin(text) for text in settings.CSRF_TRUSTED_ORIGINS}


def _origin(text: str) -> _Origin | None:
    """(scheme, host, port); None for what is no origin, such as ``null``."""
    if not re.fullmatch(r"[a-z]+://[^/?#@]+", text, re.IGNORECASE):
        return None
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        return None
    return parts.scheme, parts.hostname, port or _DEFAULT_PORTS[parts.scheme]
