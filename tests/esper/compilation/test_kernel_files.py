"""A kernel from anywhere: what is let in, what is not, and how it lies on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.compilation.bundle import pack
from esper.compilation.store import KernelStore, stage
from esper.compilation.verify import open_kernel
from esper.contracts import (
    BUNDLE_FILES,
    Certificate,
    CostForecast,
    KernelBundle,
    KernelDraft,
    KernelKey,
    KernelReport,
    KernelSpec,
    codec,
    signing,
)
from esper.contracts.kernels import MAX_FILE_BYTES
from esper.exceptions import KernelDigestError, KernelError, SignatureError

PRIVATE_KEY = signing.generate_private_key()
TRUSTED_KEY = signing.public_key(PRIVATE_KEY)
KEY = KernelKey(
    blueprint="proj_lora_64",
    blueprint_version="0123456789abcdef",
    config={"rank": 4},
    layer_kind="Linear",
    in_shape=(8, 16),
    out_shape=(8, 16),
    dtype="float32",
    capability="cpu",
    device_name="x86_64 AVX2",
    torch_version="2.13.0",
    python_version="3.11.7",
)
SPEC = KernelSpec("proj_lora_64", "0123456789abcdef", {"rank": 4}, 7)
REPORT = KernelReport(
    certificate=Certificate(0.0, 0.0, True, True, True, 128, 128, latency_ms=0.5),
    forecast=CostForecast(128, 2048, 0.01, float("nan")),
    stage_ms={"certify": 1.5},
)


def signed_kernel(spec: KernelSpec = SPEC, private_key: str = PRIVATE_KEY) -> KernelBundle:
    return pack(KernelDraft(KEY, spec, REPORT), private_key=private_key)


BUNDLE = signed_kernel()


def test_a_signed_kernel_opens_to_what_was_packed() -> None:
    key, spec, report = open_kernel(BUNDLE.files, BUNDLE.digest, TRUSTED_KEY)

    assert key == KEY
    assert spec == SPEC
    assert report.stage_ms == REPORT.stage_ms
    assert report.certificate.latency_ms == 0.5
    assert report.certificate.memory_mib != report.certificate.memory_mib  # NaN stays unknown


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(BUNDLE_FILES), position=st.integers(0), bit=st.integers(0, 7))
def test_no_flipped_bit_gets_in(name: str, position: int, bit: int) -> None:
    data = bytearray(BUNDLE.files[name])
    data[position % len(data)] ^= 1 << bit

    with pytest.raises((KernelDigestError, SignatureError)):
        open_kernel({**BUNDLE.files, name: bytes(data)}, BUNDLE.digest, TRUSTED_KEY)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(BUNDLE_FILES), data=st.binary(max_size=200))
def test_no_foreign_content_gets_in(name: str, data: bytes) -> None:
    with pytest.raises((KernelDigestError, SignatureError)):
        open_kernel({**BUNDLE.files, name: data}, BUNDLE.digest, TRUSTED_KEY)


@settings(max_examples=50, deadline=None)
@given(manifest=st.binary(max_size=200))
def test_a_signed_manifest_of_invalid_content_is_refused_and_never_crashes(manifest: bytes) -> None:
    files = {
        **BUNDLE.files,
        "manifest.json": manifest,
        "manifest.sig": signing.sign(manifest, PRIVATE_KEY).encode(),
    }
    with pytest.raises(KernelDigestError):
        open_kernel(files, KernelBundle(files).digest, TRUSTED_KEY)


@pytest.mark.parametrize("listing", [[], {}, {"format": "esper-kernel-1"}, None, 7, "x"])
def test_a_signed_manifest_of_another_shape_is_refused(listing: object) -> None:
    manifest = codec.encode(listing)
    files = {
        **BUNDLE.files,
        "manifest.json": manifest,
        "manifest.sig": signing.sign(manifest, PRIVATE_KEY).encode(),
    }
    with pytest.raises(KernelDigestError):
        open_kernel(files, KernelBundle(files).digest, TRUSTED_KEY)


def test_a_kernel_by_another_signer_is_refused() -> None:
    foreign = signed_kernel(private_key=signing.generate_private_key())

    with pytest.raises(SignatureError):
        open_kernel(foreign.files, foreign.digest, TRUSTED_KEY)


def test_another_kernel_of_the_right_signer_is_refused_under_this_digest() -> None:
    other = signed_kernel(KernelSpec("proj_lora_64", "0123456789abcdef", {"rank": 4}, 8))

    with pytest.raises(KernelDigestError):
        open_kernel(other.files, BUNDLE.digest, TRUSTED_KEY)


def test_a_spec_for_another_blueprint_than_the_manifest_names_is_refused() -> None:
    mixed = signed_kernel(KernelSpec("attn_std", "0123456789abcdef", {"rank": 4}, 7))

    with pytest.raises(KernelDigestError, match="different blueprints"):
        open_kernel(mixed.files, mixed.digest, TRUSTED_KEY)


@pytest.mark.parametrize("name", BUNDLE_FILES)
def test_missing_oversize_and_foreign_files_are_refused(name: str) -> None:
    without = {key: value for key, value in BUNDLE.files.items() if key != name}
    for files in (
        without,
        {**BUNDLE.files, name: b"x" * (MAX_FILE_BYTES + 1)},
        {**BUNDLE.files, "extra.py": b"import os"},
    ):
        with pytest.raises(KernelDigestError):
            open_kernel(files, BUNDLE.digest, TRUSTED_KEY)


@pytest.mark.parametrize(
    "digest",
    ["", "..", "../" * 30, "a" * 63, "A" * 64, "a" * 64 + "\n", "/etc/passwd", "a" * 65, "é" * 64],
)
def test_a_digest_that_is_none_never_becomes_a_path(digest: str, tmp_path: Path) -> None:
    store = KernelStore(tmp_path / "kernels")
    for act in (store.path, store.has, store.get, store.remove):
        with pytest.raises(KernelDigestError):
            act(digest)
    with pytest.raises(KernelDigestError):
        stage(BUNDLE.files, digest, tmp_path / "stage")
    with pytest.raises(KernelDigestError):
        open_kernel(BUNDLE.files, digest, TRUSTED_KEY)


def test_a_stored_kernel_comes_back_whole_and_can_be_forgotten(tmp_path: Path) -> None:
    store = KernelStore(tmp_path)

    digest = store.put(BUNDLE)

    assert store.has(digest)
    assert store.get(digest) == BUNDLE.files
    assert store.list() == (digest,)
    assert store.put(BUNDLE) == digest  # twice is harmless
    assert store.remove(digest)
    assert not store.remove(digest)
    assert store.list() == ()
    with pytest.raises(KernelError, match="no kernel"):
        store.get(digest)


def test_a_write_that_fails_leaves_no_half_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = KernelStore(tmp_path)
    synced = iter([None, OSError("disk full")])

    def fsync_fails_at_the_second_file(descriptor: int) -> None:
        if error := next(synced):
            raise error

    monkeypatch.setattr(os, "fsync", fsync_fails_at_the_second_file)
    with pytest.raises(OSError, match="disk full"):
        store.put(BUNDLE)

    assert not store.has(BUNDLE.digest)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_store_the_same_kernel_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = KernelStore(tmp_path), KernelStore(tmp_path)
    rename = Path.rename

    def rename_after_the_other(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        first.put(BUNDLE)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_after_the_other)
    second.put(BUNDLE)

    assert second.get(BUNDLE.digest) == BUNDLE.files
    assert [path.name for path in tmp_path.iterdir()] == [BUNDLE.digest[:2]]


def test_a_link_in_the_store_is_not_followed(tmp_path: Path) -> None:
    store = KernelStore(tmp_path / "kernels")
    digest = store.put(BUNDLE)
    secret = tmp_path / "secret"
    secret.write_bytes(b"not for you")
    spec = store.path(digest) / "recipe.json"
    spec.unlink()
    spec.symlink_to(secret)

    with pytest.raises(KernelDigestError):
        store.get(digest)


def test_a_file_that_grew_in_the_store_is_not_read_to_its_end(tmp_path: Path) -> None:
    store = KernelStore(tmp_path)
    digest = store.put(BUNDLE)
    (store.path(digest) / "report.json").write_bytes(b" " * (MAX_FILE_BYTES + 1))

    with pytest.raises(KernelDigestError, match="too large"):
        store.get(digest)


def test_a_staged_kernel_lies_where_a_trainer_looks(tmp_path: Path) -> None:
    store = KernelStore(tmp_path / "kernels")
    digest = store.put(BUNDLE)

    folder = stage(store.get(digest), digest, tmp_path / "stage")

    assert folder == tmp_path / "stage" / digest
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == BUNDLE.files
    assert stage(store.get(digest), digest, tmp_path / "stage") == folder  # again is harmless


def test_serving_kernels_needs_no_torch() -> None:
    code = (
        "import sys, esper.compilation.store, esper.compilation.verify, esper.compilation.bundle\n"
        "import esper.utils.config\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
