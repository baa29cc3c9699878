"""Ed25519 signatures over kernels and commands. Keys are base64 of their 32 raw bytes."""

from __future__ import annotations

import base64
import binascii

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from esper.exceptions import ConfigurationError, SignatureError


def generate_private_key() -> str:
    return base64.b64encode(Ed25519PrivateKey.generate().private_bytes_raw()).decode("ascii")


def public_key(private_key: str) -> str:
    """The public half.

    Raises:
        ConfigurationError: not a private key.
    """
    return base64.b64encode(_private(private_key).public_key().public_bytes_raw()).decode("ascii")


def sign(data: bytes, private_key: str) -> str:
    """Base64 of the signature; raises ``ConfigurationError`` for a bad key."""
    return base64.b64encode(_private(private_key).sign(data)).decode("ascii")


def verify(data: bytes, signature: str, trusted_key: str) -> None:
    """Returns when ``trusted_key`` signed ``data``.

    Raises:
        SignatureError: it did not, or the signature or the key is malformed.
    """
    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(trusted_key, validate=True))
        raw = base64.b64decode(signature, validate=True)
        # Decoding ignores four bits before the padding; without this check, one signature would
        # have several spellings.
        if base64.b64encode(raw).decode("ascii") != signature:
            raise InvalidSignature
        key.verify(raw, data)
    except (InvalidSignature, ValueError, binascii.Error) as error:
        raise SignatureError("the signature is not by the key that this run trusts") from error


def _private(key: str) -> Ed25519PrivateKey:
    try:
        return Ed25519PrivateKey.from_private_bytes(base64.b64decode(key, validate=True))
    except (ValueError, binascii.Error) as error:
        raise ConfigurationError("a signing key is base64 of 32 bytes") from error
