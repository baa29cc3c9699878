"""Fetches a kernel's files by digest, from this host's stage or over HTTP."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from esper.compilation.verify import check_digest
from esper.contracts import BUNDLE_FILES
from esper.contracts.kernels import size_limit


def code_key() -> str:
    """The public key of the compile workers whose machine code may run in this process.

    It is ``ESPER_COMPILED_KERNEL_KEY``; empty: no machine code runs. A kernel of tier 0 is data and
    needs no such trust.
    """
    return os.environ.get("ESPER_COMPILED_KERNEL_KEY", "").strip()


async def fetch_kernel(
    digest: str,
    download: Callable[[str], Awaitable[bytes]],
    names: Sequence[str] = BUNDLE_FILES,
) -> dict[str, bytes]:
    """The files of a bundle, from this host's stage where they lie, else over HTTP.

    Nothing is parsed here. The caller checks staged and downloaded files alike.

    Args:
        download: path relative to the API -> bytes.
        names: ``BUNDLE_FILES``, or ``COMPILED_FILES`` for a kernel with machine code.

    Raises:
        KernelDigestError: ``digest`` is not a digest.
        TransportError: it could not be fetched.
    """
    check_digest(digest)
    staged = read_stage(digest, names)
    if staged is not None:
        return staged
    return {name: await download(f"kernels/{digest}/{name}") for name in names}


def read_stage(digest: str, names: Sequence[str] = BUNDLE_FILES) -> dict[str, bytes] | None:
    """The bundle from ``ESPER_STAGE_DIR/<digest>/``, None where it is not complete there."""
    stage = os.environ.get("ESPER_STAGE_DIR", "")
    if not stage:
        return None
    folder = Path(stage) / digest
    try:
        return {name: _read_capped(folder / name) for name in names}
    except OSError:
        return None


def _read_capped(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(size_limit(path.name) + 1)  # one byte too many fails the size check
