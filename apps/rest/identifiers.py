"""Public identifiers: a prefix that names the kind, then 26 sortable characters (ULID)."""

from __future__ import annotations

import re
import secrets
import time

from django.db.models import Q

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
UID_LENGTH = 32


def new_uid(prefix: str) -> str:
    """``run_01J…``: 48 bits of milliseconds and 80 random bits, in Crockford's base 32."""
    number = (time.time_ns() // 1_000_000 << 80) | secrets.randbits(80)
    digits = "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))
    return f"{prefix}_{digits}"


def named(name: str, letter: str) -> Q:
    """The row with this uid, or with this number for people: ``A-17`` where ``letter`` is A."""
    number = re.fullmatch(rf"{letter}-([0-9]{{1,18}})", name)
    return Q(pk=int(number[1])) if number else Q(uid=name)
