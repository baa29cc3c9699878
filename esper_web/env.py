"""Settings from the environment. A bad value stops the start-up with a sentence.

Every name that is read here is noted in ``READ``; a test compares it with docs/settings.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import environ
from django.core.exceptions import ImproperlyConfigured

from esper.contracts.signing import public_key
from esper.exceptions import ConfigurationError

READ: set[str] = set()

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
TRUE = frozenset({"1", "true", "yes", "on"})
FALSE = frozenset({"0", "false", "no", "off"})


def text(name: str, default: str | None = None) -> str:
    """The value, or ``default``; without a default the variable is required."""
    READ.add(name)
    value = os.environ.get(name, default)
    if value is None or (default is None and not value.strip()):
        raise ImproperlyConfigured(f"{name} is not set. Esper cannot start without it.")
    return value.strip()


def secret(name: str, *, minimum_length: int = 50) -> str:
    """A required secret that is neither short nor a placeholder."""
    value = text(name)
    if len(value) < minimum_length or len(set(value)) < 5 or "insecure" in value.lower():
        raise ImproperlyConfigured(
            f"{name} is too weak: it needs {minimum_length} random characters. Make one with "
            "python -c 'import secrets; print(secrets.token_urlsafe(50))'"
        )
    return value


def signing_key(name: str) -> str:
    """A required Ed25519 private key."""
    value = text(name)
    try:
        public_key(value)
    except ConfigurationError as error:
        raise ImproperlyConfigured(
            f"{name}: {error}. Make one with "
            "python -c 'from esper.contracts import signing; print(signing.generate_private_key())'"
        ) from None
    return value


def flag(name: str, default: bool) -> bool:
    """A switch: true/false, yes/no, on/off, 1/0."""
    value = text(name, str(default)).lower()
    if value not in TRUE | FALSE:
        raise ImproperlyConfigured(f"{name} must be true or false, not {value!r}.")
    return value in TRUE


def integer(name: str, default: int, *, minimum: int, maximum: int) -> int:
    """A whole number between two limits."""
    value = text(name, str(default))
    try:
        number = int(value)
    except ValueError:
        raise ImproperlyConfigured(f"{name} must be a whole number, not {value!r}.") from None
    if not minimum <= number <= maximum:
        raise ImproperlyConfigured(f"{name} must lie in {minimum}…{maximum}, not {number}.")
    return number


def listing(name: str, default: str | None = None) -> list[str]:
    """Values separated by commas."""
    return [part.strip() for part in text(name, default).split(",") if part.strip()]


def hosts(name: str) -> list[str]:
    """Host names that Esper answers to; ``*`` would let anyone forge links and sockets."""
    names = listing(name)
    if not names or "*" in names:
        raise ImproperlyConfigured(f"{name} must name the hosts of this installation, not '*'.")
    return names


def directory(name: str, default: Path) -> Path:
    """An absolute path; it is made when it is first needed."""
    return Path(text(name, str(default))).expanduser().resolve()


def redis_url(name: str, default: str | None = None) -> str:
    """A Redis or Valkey URL; one that others can reach must have a password."""
    url = text(name, default)
    parts = urlsplit(url)
    if parts.scheme not in {"redis", "rediss"} or not parts.hostname:
        raise ImproperlyConfigured(f"{name} must look like redis://:password@host:6379/0.")
    if parts.hostname not in LOOPBACK and not parts.password:
        raise ImproperlyConfigured(
            f"{name} names {parts.hostname}, which others can reach, without a password. "
            "Whoever can write to Redis can give orders to the workers."
        )
    return url


def database(name: str, default: str | None = None) -> dict[str, Any]:
    """``DATABASES["default"]`` from a URL: SQLite for one machine, PostgreSQL for a team."""
    try:
        return database_from_url(text(name, default))
    except ValueError as error:
        raise ImproperlyConfigured(f"{name} {error}") from None


def database_from_url(url: str) -> dict[str, Any]:
    """Django's configuration for a database; raises ``ValueError`` for one that we do not know."""
    try:
        config = dict(environ.Env.db_url_config(url))
    except Exception as error:
        raise ValueError(f"cannot be read: {error}") from None
    engine = str(config.get("ENGINE", ""))
    if engine.endswith("sqlite3"):
        return config | {"OPTIONS": dict(SQLITE_OPTIONS)}
    if engine.endswith("postgresql"):
        options = POSTGRESQL_OPTIONS | config.get("OPTIONS", {})
        return config | {"CONN_MAX_AGE": 0, "OPTIONS": options}
    raise ValueError("must start with sqlite:// or postgresql://.")


# WAL lets readers go on beside the one writer; IMMEDIATE takes the write lock at BEGIN, because a
# transaction that upgrades from read to write later fails at once, whatever the timeout.
SQLITE_OPTIONS: dict[str, Any] = {
    "timeout": 20,
    "transaction_mode": "IMMEDIATE",
    "init_command": (
        "PRAGMA journal_mode=WAL;PRAGMA synchronous=NORMAL;PRAGMA mmap_size=134217728;"
        "PRAGMA journal_size_limit=27103364;PRAGMA cache_size=-20000;PRAGMA foreign_keys=ON;"
    ),
}
# A pool, not CONN_MAX_AGE: under ASGI each request has its own thread, so that persistent
# connections are opened anew for every request (measured: half the throughput).
POSTGRESQL_OPTIONS: dict[str, Any] = {"pool": {"min_size": 2, "max_size": 8, "timeout": 10}}
