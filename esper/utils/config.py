"""The settings of a service process."""

from __future__ import annotations

import math
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from esper.exceptions import ConfigurationError


def _variable(name: str) -> str | None:
    """The variable, else what the file ``NAME_FILE`` holds, as the server reads its settings."""
    path = os.environ.get(f"{name}_FILE")
    if os.environ.get(name) or not path:
        return os.environ.get(name) or None
    try:
        return Path(path).read_text().strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{name}_FILE names {path}, which cannot be read") from error


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """Settings of one service process; an invalid value prevents the start.

    Attributes:
        name: the service's name, ``tamiyo``.
        port: port of its status page; None or 0: no status page.
        redis_url: address of the health stream; default ``REDIS_URL``; None: poll over REST.
        urza_url: address of the server; default ``ESPER_SERVER``; None: in-process, without a
            server.
        token: the service's token with scope ``decide``; default ``ESPER_TOKEN``.
        learning: let outcomes of earlier adaptations change proposals.
        instance: identifies this instance among several; default ``<host>-<pid>``.
        refresh_seconds: the maximum age of a run's state.
        claim_seconds: after this time without an answer another instance's entry is claimed.
        decline_quiet_seconds: the same refusal is not recorded again within this time.

    Raises:
        ConfigurationError: a value is not valid.
    """

    name: str
    port: int | None = None
    host: str = "127.0.0.1"
    redis_url: str | None = field(default_factory=lambda: _variable("REDIS_URL"))
    urza_url: str | None = field(default_factory=lambda: _variable("ESPER_SERVER"))
    token: str | None = field(default_factory=lambda: _variable("ESPER_TOKEN"), repr=False)
    learning: bool = True
    instance: str = field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")
    heartbeat_seconds: float = 5.0
    refresh_seconds: float = 5.0
    claim_seconds: float = 5.0
    decline_quiet_seconds: float = 60.0
    request_timeout_seconds: float = 10.0

    def __post_init__(self) -> None:
        if not self.name or not self.instance:
            raise ConfigurationError("a service must have a name")
        if self.port is not None and not 0 <= self.port <= 65535:
            raise ConfigurationError(f"a port is 0..65535, got {self.port}")
        _check_url("urza_url", self.urza_url, ("http", "https"))
        _check_url("redis_url", self.redis_url, ("redis", "rediss", "unix"))
        for name in (
            "heartbeat_seconds",
            "refresh_seconds",
            "claim_seconds",
            "decline_quiet_seconds",
            "request_timeout_seconds",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigurationError(f"{name} must be a time above 0, got {value}")


def _check_url(name: str, url: str | None, schemes: tuple[str, ...]) -> None:
    if url is None:
        return
    parts = urlsplit(url)
    if parts.scheme not in schemes or not (parts.netloc or parts.path):
        raise ConfigurationError(f"{name} is {'/'.join(schemes)}://…, got scheme {parts.scheme!r}")
