"""Verifies kernels; every kernel is opened through this module. Imports no torch."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from typing import Any

from esper.compilation.bundle import (
    FORMAT,
    LISTED_COMPILED_FILES,
    LISTED_FILES,
    report_from_wire,
    spec_from_wire,
)
from esper.contracts import KernelKey, KernelReport, KernelSpec, codec, signing
from esper.contracts.kernels import (
    CODE_FILE,
    MANIFEST_FILE,
    MAX_FILE_BYTES,
    REPORT_FILE,
    SIGNATURE_FILE,
    SPEC_FILE,
    size_limit,
)
from esper.exceptions import CodecError, KernelDigestError, SignatureError

PACKAGE_FILE = "model.pt2"
PACKAGE_FORMAT = "esper-package-1"
MAX_PACKAGE_BYTES = 16 * 1024**3
_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_digest(digest: str) -> str:
    """Returns ``digest`` if it has 64 lower-case hex digits, and so is never a path.

    Raises:
        KernelDigestError: it has another form.
    """
    if not _DIGEST.fullmatch(digest):
        raise KernelDigestError("a kernel is named by 64 hex digits", digest=digest[:80])
    return digest


def open_kernel(
    files: Mapping[str, bytes], digest: str, trusted_key: str
) -> tuple[KernelKey, KernelSpec, KernelReport]:
    """Verifies and reads an untrusted kernel of tier 0; refuses kernels with code.

    Checks come before parsing: sizes, the manifest's digest, its signature, the digests of the
    other files, then their content.

    Args:
        files: exactly the files of ``BUNDLE_FILES``.
        digest: hex SHA-256 of the manifest, from the signed command.
        trusted_key: base64 public key of the compile workers.

    Raises:
        KernelDigestError: a file is missing, unexpected, too large, altered or malformed.
        SignatureError: the manifest is not signed by ``trusted_key``.
    """
    return _open(files, digest, trusted_key, listed=LISTED_FILES, tier=0)


def open_compiled(
    files: Mapping[str, bytes], digest: str, trusted_key: str
) -> tuple[KernelKey, KernelSpec, KernelReport, bytes]:
    """Verifies and reads an untrusted compiled kernel; its code is verified, but not opened here.

    Args:
        files: exactly the files of ``COMPILED_FILES``.
        digest, trusted_key: as :func:`open_kernel`.

    Returns:
        Key, spec, report and the verified bytes of ``inductor.tar``.

    Raises:
        KernelDigestError, SignatureError: as :func:`open_kernel`.
    """
    listed = LISTED_COMPILED_FILES
    return (*_open(files, digest, trusted_key, listed=listed, tier=1), files[CODE_FILE])


def open_package(
    files: Mapping[str, bytes], digest: str, trusted_key: str
) -> tuple[dict[str, Any], bytes]:
    """Verifies and reads an untrusted compiled model; its code is verified, but not opened here.

    Returns:
        The manifest and the verified bytes of ``model.pt2``.

    Raises:
        KernelDigestError, SignatureError: as :func:`open_kernel`.
    """
    check_digest(digest)
    if set(files) != {MANIFEST_FILE, SIGNATURE_FILE, PACKAGE_FILE}:
        raise KernelDigestError("missing or unexpected files", digest=digest)
    manifest, package = _signed_manifest(files, digest, trusted_key), files[PACKAGE_FILE]
    try:
        listing = codec.decode(manifest, max_bytes=MAX_FILE_BYTES)
        same = (
            listing["format"] == PACKAGE_FORMAT
            and listing["bytes"] == len(package) <= MAX_PACKAGE_BYTES
            and hmac.compare_digest(listing["sha256"], hashlib.sha256(package).hexdigest())
        )
    except (CodecError, TypeError, KeyError) as error:
        raise KernelDigestError(f"the manifest is malformed: {error}", digest=digest) from error
    if not same:
        raise KernelDigestError("the package differs from the signed one", digest=digest)
    return dict(listing), package


def open_any(
    files: Mapping[str, bytes], digest: str, trusted_key: str
) -> tuple[KernelKey, KernelSpec, KernelReport]:
    """Like :func:`open_kernel`, for a kernel of either tier."""
    if CODE_FILE in files:
        return open_compiled(files, digest, trusted_key)[:3]
    return open_kernel(files, digest, trusted_key)


def _open(
    files: Mapping[str, bytes], digest: str, trusted_key: str, *, listed: Sequence[str], tier: int
) -> tuple[KernelKey, KernelSpec, KernelReport]:
    check_digest(digest)
    _check_files(files, digest, {MANIFEST_FILE, SIGNATURE_FILE, *listed})
    manifest = _signed_manifest(files, digest, trusted_key)
    try:
        listing = codec.decode(manifest, max_bytes=MAX_FILE_BYTES)
        _check_listing(listing, files, digest, listed)
        key = KernelKey.from_wire(listing["key"])
        spec = spec_from_wire(codec.decode(files[SPEC_FILE], max_bytes=MAX_FILE_BYTES))
        report = report_from_wire(codec.decode(files[REPORT_FILE], max_bytes=MAX_FILE_BYTES))
    except (CodecError, TypeError, KeyError) as error:
        raise KernelDigestError(f"a kernel's file is malformed: {error}", digest=digest) from error
    _check_same_blueprint(key, spec, digest)
    if (key.tier, report.tier) != (tier, tier):
        raise KernelDigestError("key, report and files belong to different tiers", digest=digest)
    return key, spec, report


def _check_files(files: Mapping[str, bytes], digest: str, expected: set[str]) -> None:
    if set(files) != expected:
        unexpected = sorted(set(files) ^ expected)
        raise KernelDigestError(
            f"missing or unexpected files: {', '.join(unexpected)[:200]}", digest=digest
        )
    for name, data in files.items():
        if len(data) > size_limit(name):
            raise KernelDigestError(f"{name} has more than {size_limit(name)} bytes", digest=digest)


def _signed_manifest(files: Mapping[str, bytes], digest: str, trusted_key: str) -> bytes:
    manifest = files[MANIFEST_FILE]
    if not hmac.compare_digest(hashlib.sha256(manifest).hexdigest(), digest):
        raise KernelDigestError(
            "the manifest has another digest than the requested one", digest=digest
        )
    try:
        signing.verify(manifest, files[SIGNATURE_FILE].decode("ascii"), trusted_key)
    except (SignatureError, UnicodeDecodeError) as error:
        raise SignatureError(
            "the kernel is not signed by the key that this run trusts", digest=digest
        ) from error
    return manifest


def _check_listing(
    listing: Any, files: Mapping[str, bytes], digest: str, listed: Sequence[str]
) -> None:
    if listing["format"] != FORMAT or set(listing["files"]) != set(listed):
        raise KernelDigestError("the manifest has another format", digest=digest)
    for name in listed:
        entry, data = listing["files"][name], files[name]
        actual = hashlib.sha256(data).hexdigest()
        if entry["bytes"] != len(data) or not hmac.compare_digest(actual, entry["sha256"]):
            raise KernelDigestError(f"{name} differs from the signed file", digest=digest)


def _check_same_blueprint(key: KernelKey, spec: KernelSpec, digest: str) -> None:
    named = (key.blueprint, key.blueprint_version, key.config)
    if named != (spec.blueprint, spec.blueprint_version, spec.config):
        raise KernelDigestError("manifest and kernel spec name different blueprints", digest=digest)
