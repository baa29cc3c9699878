"""The secrets of an installation on one machine: ``secrets.json`` in the data directory, mode 0600.

    secret_key, redis_password     random text
    command_key                    Ed25519, base64: web and workers sign commands with it
    audit_key                      Ed25519, base64: signs heads of the audit log and attestations
    kernel_public_key              trainers and the web trust kernels with its signature
    tokens   {"tamiyo": "esp_…", "trainer": "esp_…"}                      by create_demo_people
    people   {"<user name>": {"role", "password", "token"}}               by create_demo_people

The private kernel key is in a file of its own, ``kernel.key``; only the compile worker gets its
path. Production does not use these files: there, every value comes from the environment.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from esper.contracts.signing import generate_private_key, public_key

SECRETS_FILE = "secrets.json"
KERNEL_KEY_FILE = "kernel.key"


def kernel_key_path(data_dir: Path) -> Path:
    """The file of the private kernel key."""
    return data_dir / KERNEL_KEY_FILE


def read_keyring(data_dir: Path) -> dict[str, Any]:
    """The content of the file; empty when there is none yet."""
    path = data_dir / SECRETS_FILE
    if not path.exists():
        return {}
    keyring: dict[str, Any] = json.loads(path.read_text())
    return keyring


def ensure_keyring(data_dir: Path) -> dict[str, Any]:
    """The secrets, created on first use."""
    keyring = read_keyring(data_dir)
    if not keyring:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        kernel_key = generate_private_key()
        write_private(kernel_key_path(data_dir), kernel_key)
        keyring = {
            "secret_key": secrets.token_urlsafe(50),
            "redis_password": secrets.token_urlsafe(32),
            "command_key": generate_private_key(),
            "audit_key": generate_private_key(),
            "kernel_public_key": public_key(kernel_key),
            "tokens": {},
            "people": {},
        }
        _write_keyring(data_dir, keyring)
    if "audit_key" not in keyring:  # of an earlier version
        keyring["audit_key"] = generate_private_key()
        _write_keyring(data_dir, keyring)
    return keyring


def update_keyring(data_dir: Path, **entries: Any) -> dict[str, Any]:
    """Replaces entries; a dict (``tokens``, ``people``) is merged into the present one."""
    keyring = ensure_keyring(data_dir)
    for name, value in entries.items():
        keyring[name] = {**keyring[name], **value} if isinstance(value, dict) else value
    _write_keyring(data_dir, keyring)
    return keyring


def write_private(path: Path, content: str) -> None:
    """Writes a file that only its owner can read, completely or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # a part of it would fill the disk further
        temporary.unlink(missing_ok=True)
        raise


def _write_keyring(data_dir: Path, keyring: dict[str, Any]) -> None:
    write_private(data_dir / SECRETS_FILE, json.dumps(keyring, indent=2) + "\n")
