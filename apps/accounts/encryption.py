"""Secrets that the server has to read again are encrypted in the database, by ``SECRET_KEY``."""

from __future__ import annotations

import base64
import hashlib

from cryptography.fernet import Fernet
from django.conf import settings


def cipher(purpose: str) -> Fernet:
    """With a key of its own for each purpose. A new ``SECRET_KEY`` makes old secrets unreadable."""
    seed = hashlib.sha256(f"{purpose}\n{settings.SECRET_KEY}".encode()).digest()
    return Fernet(base64.urlsafe_b64encode(seed))
