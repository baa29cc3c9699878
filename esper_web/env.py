"""Settings from the environment. A wrong value stops the start with a message.

Every name that is read is in ``READ``; a test compares it with docs/settings.md.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from django.core.exceptions import ImproperlyConfigured

from esper.contracts import Role
from esper.contracts.signing import public_key
from esper.exceptions import ConfigurationError

READ: set[str] = set()

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
TRUE = frozenset({"1", "true", "yes", "on"})
FALSE = frozenset({"0", "false", "no", "off"})


def text(name: str, default: str | None = None) -> str:
    """The value, else what the file ``NAME_FILE`` holds, else ``default``; else it is required."""
    READ.add(name)
    value = os.environ.get(name)
    if value is None:
        value = _from_file(f"{name}_FILE")
    if value is None:
        value = default
    if value is None or (default is None and not value.strip()):
        raise ImproperlyConfigured(f"{name} is not set. Esper cannot start without it.")
    return value.strip()


def _from_file(name: str) -> str | None:
    path = os.environ.get(name)
    if not path:
        return None
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ImproperlyConfigured(f"{name} names {path}, which cannot be read.") from error


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


def roles(name: str) -> frozenset[str]:
    """Roles of people, separated by commas; none by default."""
    given = frozenset(listing(name, ""))
    unknown = given - set(Role)
    if unknown:
        raise ImproperlyConfigured(
            f"{name} names {', '.join(sorted(unknown))}; the roles are {', '.join(Role)}."
        )
    return given


@dataclass(frozen=True, slots=True)
class GroupRole:
    """Who is in ``group`` at the provider has ``role``: of the account, or in one project."""

    group: str
    role: Role
    project: str = ""


def group_roles(name: str) -> tuple[GroupRole, ...]:
    """``group=role`` or ``group=role@project``, separated by commas."""
    found = []
    for part in listing(name, ""):
        group, _, right = part.rpartition("=")
        role, _, project = right.partition("@")
        if not group or role not in set(Role):
            raise ImproperlyConfigured(
                f"{name} has {part!r}, which is not group=role or group=role@project with one of "
                f"the roles {', '.join(Role)}."
            )
        found.append(GroupRole(group, Role(role), project))
    return tuple(found)


def issuer(name: str) -> str:
    """The address of an OpenID provider; empty: there is none. Plain HTTP only on this machine."""
    address = text(name, "")
    parts = urlsplit(address)
    safe = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)
    if (address and not (safe and parts.hostname)) or parts.query or parts.fragment:
        raise ImproperlyConfigured(f"{name} must look like https://id.example.org/realms/team.")
    return address


def together(first: str, given: object, others: dict[str, object]) -> None:
    """Some settings need others: which ones are missing stops the start."""
    missing = [name for name, value in others.items() if not value]
    if given and missing:
        raise ImproperlyConfigured(f"{first} needs {' and '.join(missing)} too.")


def hosts(name: str) -> list[str]:
    """Host names that Esper answers to. ``*`` would accept forged links and sockets."""
    names = listing(name)
    if not names or "*" in names:
        raise ImproperlyConfigured(f"{name} must name the hosts of this installation, not '*'.")
    return names


def directory(name: str, default: Path) -> Path:
    """An absolute path. The directory is created when it is first needed."""
    return Path(text(name, str(default)) or default).expanduser().resolve()


def redis_url(name: str, default: str | None = None) -> str:
    """A Redis or Valkey URL. One that other machines can reach must have a password."""
    url = text(name, default)
    parts = urlsplit(url)
    if parts.scheme not in {"redis", "rediss"} or not parts.hostname:
        raise ImproperlyConfigured(f"{name} must look like redis://:password@host:6379/0.")
    if parts.hostname not in LOOPBACK and not parts.password:
        raise ImproperlyConfigured(
            f"{name} names {parts.hostname}, which others can reach, without a password. "
            "Whoever can write to Redis can send tasks to the workers."
        )
    return url


def database(name: str, default: str | None = None) -> dict[str, Any]:
    """``DATABASES["default"]`` from a URL: SQLite for one machine, PostgreSQL for a team."""
    try:
        return database_from_url(text(name, default))
    except ValueError as error:
        raise ImproperlyConfigured(f"{name} {error}") from None


def database_from_url(url: str) -> dict[str, Any]:
    """Django's configuration for a database.

    ``sqlite:////absolute/path``, ``sqlite:///relative/path``, ``sqlite://:memory:``, or
    ``postgresql://user:password@host:port/name?sslmode=require``. Special characters in it are
    percent-encoded; its query goes to the driver.

    Raises:
        ValueError: the URL is not one of these. The message does not contain its password.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite" and rest:
        return _sqlite(rest)
    if scheme in {"postgresql", "postgres"}:
        try:
            parts = urlsplit(url)
        except ValueError:  # its message may contain the password
            raise ValueError("cannot be read; check its host and special characters.") from None
        return _postgresql(parts)
    raise ValueError("must start with sqlite:// or postgresql://.")


def _sqlite(rest: str) -> dict[str, Any]:
    name = rest if rest == ":memory:" else rest.removeprefix("/")
    if not name:
        raise ValueError("names no file; write sqlite:////absolute/path.")
    return {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": name,
        "OPTIONS": dict(SQLITE_OPTIONS),
    }


def _postgresql(parts: SplitResult) -> dict[str, Any]:
    name = unquote(parts.path.removeprefix("/"))
    if not name:
        raise ValueError("names no database; write postgresql://user:password@host:5432/name.")
    try:
        port = parts.port
    except ValueError:
        raise ValueError("has a port that is not a number in 0…65535.") from None
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": name,
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": unquote(parts.hostname or ""),
        "PORT": port or "",
        "CONN_MAX_AGE": 0,
        "OPTIONS": POSTGRESQL_OPTIONS | dict(parse_qsl(parts.query)),
    }


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
