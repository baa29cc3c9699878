"""Web Push: a message that only one browser can read, for the push service of the browser's maker.

Encryption as in RFC 8291 and RFC 8188, the sender's name as in RFC 8292 (VAPID). The libraries for
it were looked at: pywebpush needs http_ece, which has no wheel, and aiohttp; webpush needs pydantic
and a mail validator. What remains are the primitives of cryptography, which is here anyway.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from esper.contracts import codec

CURVE = ec.SECP256R1()
RECORD_BYTES = 4096  # the whole message is one record
MAX_PLAIN_BYTES = 3000  # a push service takes 4096 bytes, keys and padding among them
TTL_SECONDS = 4 * 3600  # a browser that is switched on later is not told any more
TOKEN_SECONDS = 12 * 3600  # a push service accepts 24 hours at most
AUTH_BYTES = 16


class BadKeysError(ValueError):
    """These are no keys of a browser's subscription."""


@dataclass(frozen=True, slots=True)
class Subscription:
    """A browser, as ``PushSubscription.toJSON()`` gives it.

    Attributes:
        endpoint: https address at the push service; whoever knows it may not write to it alone.
        p256dh: the browser's public key, 65 bytes.
        auth: secret of 16 bytes that it shares with us.

    Raises:
        BadKeysError: the keys have another form.
    """

    endpoint: str
    p256dh: bytes
    auth: bytes

    def __post_init__(self) -> None:
        if len(self.auth) != AUTH_BYTES:
            raise BadKeysError(f"auth must have {AUTH_BYTES} bytes")
        self.public_key()

    def public_key(self) -> ec.EllipticCurvePublicKey:
        """The browser's; encryption is for its owner alone."""
        try:
            return ec.EllipticCurvePublicKey.from_encoded_point(CURVE, self.p256dh)
        except ValueError:
            raise BadKeysError("p256dh must be a point of the curve P-256") from None


def server_key(seed: str) -> ec.EllipticCurvePrivateKey:
    """The key by which push services know this server; the same for the same seed."""
    info = b"esper web push"
    wide = HKDF(hashes.SHA256(), 48, None, info).derive(seed.encode())  # no bias after the modulus
    return ec.derive_private_key(int.from_bytes(wide) % (_ORDER - 1) + 1, CURVE)


def public_text(key: ec.EllipticCurvePrivateKey) -> str:
    """What a page gives to ``pushManager.subscribe`` as ``applicationServerKey``."""
    return to_text(_point(key))


def encrypt(
    message: bytes,
    to: Subscription,
    *,
    sender: ec.EllipticCurvePrivateKey | None = None,
    salt: bytes | None = None,
) -> bytes:
    """The body for the push service, in the encoding ``aes128gcm``.

    Args:
        sender: a key for this message alone; None: a new one.
        salt: 16 bytes; None: new ones.
    """
    if len(message) > MAX_PLAIN_BYTES:
        raise ValueError(f"a push message has {MAX_PLAIN_BYTES} bytes at most")
    sender = sender or ec.generate_private_key(CURVE)
    salt = salt or os.urandom(16)
    shared = sender.exchange(ec.ECDH(), to.public_key())
    own = _point(sender)
    secret = _hkdf(32, to.auth, b"WebPush: info\0" + to.p256dh + own, shared)
    key = _hkdf(16, salt, b"Content-Encoding: aes128gcm\0", secret)
    nonce = _hkdf(12, salt, b"Content-Encoding: nonce\0", secret)
    head = salt + RECORD_BYTES.to_bytes(4) + len(own).to_bytes(1) + own
    return head + AESGCM(key).encrypt(nonce, message + b"\x02", None)  # 2: the last record


def headers(
    endpoint: str, key: ec.EllipticCurvePrivateKey, *, contact: str, topic: str, urgent: bool
) -> dict[str, str]:
    """The headers of a request to a push service.

    Args:
        contact: https or mailto address of whoever runs this server.
        topic: a message that has not arrived is replaced by the next one with the same topic.
        urgent: it is shown at once by a device that saves its battery.
    """
    parts = urlsplit(endpoint)
    claims = {
        "aud": f"{parts.scheme}://{parts.netloc}",
        "exp": int(time.time()) + TOKEN_SECONDS,
        "sub": contact,
    }
    return {
        "Authorization": f"vapid t={_token(claims, key)}, k={public_text(key)}",
        "Content-Encoding": "aes128gcm",
        "Content-Type": "application/octet-stream",
        "TTL": str(TTL_SECONDS),
        "Urgency": "high" if urgent else "normal",
        "Topic": hashlib.sha256(topic.encode()).hexdigest()[:32],
        "User-Agent": "Esper",
    }


def to_text(raw: bytes) -> str:
    """Base64 for addresses, without padding."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def from_text(text: str) -> bytes:
    """The bytes; raises ``BadKeysError``."""
    try:
        padded = text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4)
        return base64.b64decode(padded, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise BadKeysError("the keys must be base64 for addresses") from None


def _token(claims: dict[str, object], key: ec.EllipticCurvePrivateKey) -> str:
    """A JSON Web Token, signed with ES256."""
    parts = (codec.encode({"alg": "ES256", "typ": "JWT"}), codec.encode(claims))
    signed = ".".join(map(to_text, parts))
    r, s = decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{signed}.{to_text(r.to_bytes(32) + s.to_bytes(32))}"


def _hkdf(length: int, salt: bytes, info: bytes, secret: bytes) -> bytes:
    return HKDF(hashes.SHA256(), length, salt, info).derive(secret)


def _point(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256
