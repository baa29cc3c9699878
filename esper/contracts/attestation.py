"""The signed record of a person's decision, which anybody can verify without the server."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from esper.contracts import codec, signing
from esper.exceptions import AttestationError, SignatureError

_MEMBERS = ("event", "shown", "signature")


def content_hash(content: Mapping[str, Any]) -> str:
    """Hex SHA-256 of canonical JSON: of an audit event, or of what an approver was shown."""
    return hashlib.sha256(codec.encode(dict(content))).hexdigest()


def attest(event: Mapping[str, Any], shown: Mapping[str, Any], private_key: str) -> dict[str, Any]:
    """The attestation of a decision.

    Args:
        event: the audit event of the decision, with its ``hash``.
        shown: what the person was shown; ``event["data"]["evidence_hash"]`` is its hash.
        private_key: the audit key.
    """
    return {
        "event": dict(event),
        "shown": dict(shown),
        "signature": signing.sign(_signed_bytes(event, shown), private_key),
    }


def verify_attestation(attestation: Any, trusted_keys: Sequence[str]) -> None:
    """Returns when the decision was made as it says, by the server that has the audit key.

    Raises:
        AttestationError: a member is missing, a hash does not match, or the signature is not by one
            of ``trusted_keys``.
    """
    if not isinstance(attestation, dict) or set(attestation) != set(_MEMBERS):
        raise AttestationError(f"an attestation has the members {', '.join(_MEMBERS)}")
    event, shown = attestation["event"], attestation["shown"]
    if not isinstance(event, dict) or not isinstance(shown, dict):
        raise AttestationError("event and shown are JSON objects")
    signature = str(attestation["signature"])
    if not any(_signed_by(key, _signed_bytes(event, shown), signature) for key in trusted_keys):
        raise AttestationError("the signature is not by an audit key that you trust")
    recorded = {name: value for name, value in event.items() if name != "hash"}
    if content_hash(recorded) != event.get("hash"):
        raise AttestationError("the hash of the audit event does not match")
    data = event.get("data")
    if not isinstance(data, dict) or data.get("evidence_hash") != content_hash(shown):
        raise AttestationError("the decision was not on what the attestation shows")


def _signed_by(key: str, data: bytes, signature: str) -> bool:
    try:
        signing.verify(data, signature, key)
    except SignatureError:
        return False
    return True


def _signed_bytes(event: Mapping[str, Any], shown: Mapping[str, Any]) -> bytes:
    # The first line keeps the signature apart from those of other things.
    return b"esper attestation\n" + codec.encode({"event": dict(event), "shown": dict(shown)})
