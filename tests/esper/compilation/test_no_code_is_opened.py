"""Only one module opens files with code, and only after it has verified them.

Every attack here carries a payload that touches a file, the canary. It must never appear.
"""

from __future__ import annotations

import ast
import io
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.compilation.archive import MAX_FILES, pack_archive, unpack_archive
from esper.compilation.bundle import pack
from esper.compilation.native import load_compiled, load_exported
from esper.compilation.store import KernelStore
from esper.compilation.verify import PACKAGE_FILE, open_compiled, open_kernel
from esper.contracts import (
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
from esper.contracts.kernels import CODE_FILE, COMPILED_FILES, MAX_CODE_BYTES
from esper.exceptions import KernelDigestError, KernelError, SignatureError

ROOT = Path(__file__).resolve().parents[3]
CODE = ("esper", "apps", "esper_web", "launcher", "hosts", "examples", "benchmarks", "scripts")
AUDITED = "esper/compilation/native.py"
PRIVATE_KEY = signing.generate_private_key()
TRUSTED_KEY = signing.public_key(PRIVATE_KEY)
REFUSALS = (KernelDigestError, SignatureError)

RUNS_CODE = frozenset(
    {
        "pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.load", "dill.load",
        "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load", "marshal.load",
        "marshal.loads", "shelve.open", "jit.load", "export.load", "hub.load",
        "aoti_load_package", "load_cache_artifacts", "load_compiled_function", "load_library",
        "ctypes.CDLL", "cdll.LoadLibrary", "load_inline", "package.PackageImporter",
        "PackageImporter", "load_pt2", "AOTICompiledModel", "CompiledArtifact.load",
    }
)  # fmt: skip


class Payload:
    """Touches the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.canary}",))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def compiled(code: bytes, private_key: str = PRIVATE_KEY) -> KernelBundle:
    """A compiled kernel around any bytes."""
    version, config, shape = "0123456789abcdef", {"rank": 4}, (8, 16)
    key = KernelKey("proj_lora_64", version, config, "Linear", shape, shape, "float32", "cpu",
                    "x86_64 AVX2", "2.13.0", "3.11.7", tier=1)  # fmt: skip
    report = KernelReport(
        Certificate(0.0, 0.0, True, True, True, 128, 128), CostForecast(128, 2048, 0.01, 0.1),
        tier=1,
    )  # fmt: skip
    spec = KernelSpec("proj_lora_64", version, config, 7)
    return pack(KernelDraft(key, spec, report), private_key=private_key, code=code)


def evil_pickle(canary: Path) -> bytes:
    return pickle.dumps(Payload(canary))


def evil_pt2(canary: Path) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data/sample_inputs/model.pt", evil_pickle(canary))
        archive.writestr("archive/models/model.json", '{"expr_str": "__import__(\'os\')"}')
    return data.getvalue()


def evil_torch_file(canary: Path) -> bytes:
    data = io.BytesIO()
    torch.save(Payload(canary), data)
    return data.getvalue()


def zip_with_a_way_out(canary: Path) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(f"../../../../../..{canary}", b"out")
        archive.writestr(str(canary), b"out")
    return data.getvalue()


def shared_library(canary: Path) -> bytes:
    return b"\x7fELF" + bytes(60) + str(canary).encode()


def safetensors_with_a_huge_header(canary: Path) -> bytes:
    return struct.pack("<Q", 8 * 1024**6) + b"{}"


ATTACKS: tuple[Callable[[Path], bytes], ...] = (
    evil_pickle, evil_pt2, evil_torch_file, zip_with_a_way_out, shared_library,
    safetensors_with_a_huge_header,
)  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", COMPILED_FILES)
def test_no_foreign_file_in_any_place_of_a_kernel_is_opened(
    attack: Callable[[Path], bytes], name: str, canary: Path
) -> None:
    honest = compiled(pack_archive({"fn.aotc": b"code"}))

    with pytest.raises(REFUSALS):
        load_compiled({**honest.files, name: attack(canary)}, honest.digest, TRUSTED_KEY)

    assert not canary.exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_code_signed_by_an_unknown_key_is_not_opened(
    attack: Callable[[Path], bytes], canary: Path
) -> None:
    unknown_key = signing.generate_private_key()
    bundle = compiled(pack_archive({"fn.aotc": attack(canary)}), private_key=unknown_key)
    package = attack(canary)
    manifest = codec.encode(
        {"format": "esper-package-1", "bytes": len(package), "sha256": "0" * 64}
    )
    files = {
        "manifest.json": manifest,
        "manifest.sig": signing.sign(manifest, unknown_key).encode(),
        PACKAGE_FILE: package,
    }

    with pytest.raises(SignatureError):
        load_compiled(bundle.files, bundle.digest, TRUSTED_KEY)
    with pytest.raises(SignatureError):
        load_exported(files, KernelBundle(files).digest, TRUSTED_KEY)

    assert not canary.exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_signed_manifest_is_valid_only_for_its_own_package(
    attack: Callable[[Path], bytes], canary: Path
) -> None:
    manifest = codec.encode({"format": "esper-package-1", "bytes": 4, "sha256": "0" * 64})
    files = {
        "manifest.json": manifest,
        "manifest.sig": signing.sign(manifest, PRIVATE_KEY).encode(),
        PACKAGE_FILE: attack(canary),
    }

    with pytest.raises(KernelDigestError):
        load_exported(files, KernelBundle(files).digest, TRUSTED_KEY)

    assert not canary.exists()


def test_no_flipped_byte_anywhere_gets_as_far_as_the_code(canary: Path) -> None:
    """Every byte of the small files, and thousands of the large one."""
    bundle = compiled(pack_archive({"fn.aotc": evil_pickle(canary), "a/b.so": os.urandom(20_000)}))
    chance = random.Random(0)
    for name, data in bundle.files.items():
        places = range(len(data)) if name != CODE_FILE else chance.sample(range(len(data)), 2_000)
        for place in places:
            flipped = bytearray(data)
            flipped[place] ^= 1 << chance.randrange(8)
            with pytest.raises(REFUSALS):
                load_compiled({**bundle.files, name: bytes(flipped)}, bundle.digest, TRUSTED_KEY)

    assert not canary.exists()


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"\0", lambda d: b""])
def test_cut_off_and_lengthened_files_are_refused(change: Callable[[bytes], bytes]) -> None:
    bundle = compiled(pack_archive({"fn.aotc": b"code"}))
    for name in COMPILED_FILES:
        with pytest.raises(REFUSALS):
            open_compiled(
                {**bundle.files, name: change(bundle.files[name])}, bundle.digest, TRUSTED_KEY
            )


def test_wrong_digests_are_refused_by_every_caller(tmp_path: Path) -> None:
    bundle = compiled(pack_archive({"fn.aotc": b"code"}))
    for digest in ("0" * 64, bundle.digest[::-1], bundle.digest.upper(), "", "../x"):
        for read in (open_compiled, open_kernel, load_compiled):
            with pytest.raises(REFUSALS):
                read(bundle.files, digest, TRUSTED_KEY)


def test_a_tier_0_kernel_with_code_smuggled_in_is_refused() -> None:
    bundle = compiled(pack_archive({"fn.aotc": b"code"}))

    with pytest.raises(KernelDigestError):
        open_kernel(bundle.files, bundle.digest, TRUSTED_KEY)


# -- the archive, after everything was signed: the last line --------------------------------------


def tar(change: Callable[[tarfile.TarInfo], None], data: bytes = b"x") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo("fn.aotc")
        entry.size = len(data)
        change(entry)
        archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def named(name: str) -> bytes:
    return tar(lambda entry: setattr(entry, "name", name))


def of_type(kind: bytes, target: str = "/etc/passwd") -> bytes:
    def change(entry: tarfile.TarInfo) -> None:
        entry.type, entry.linkname, entry.size = kind, target, 0

    return tar(change)


def compressed(data: bytes, how: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{how}") as archive:
        entry = tarfile.TarInfo("fn.aotc")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def claiming(size: int) -> bytes:
    """A header that declares more than follows."""
    data = bytearray(named("fn.aotc"))
    data[124:136] = b"%011o\0" % size
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


ARCHIVES = {
    "a way up": named("../escaped"),
    "a way up inside": named("a/../../escaped"),
    "absolute": named("/tmp/escaped"),
    "hidden": named(".bashrc"),
    "backslash": named("a\\..\\b"),
    "newline": named("a\nb"),
    "deep": named("/".join("abcdefgh")),
    "long": named("a" * 300),
    "symlink": of_type(tarfile.SYMTYPE),
    "hard link": of_type(tarfile.LNKTYPE),
    "device": of_type(tarfile.CHRTYPE),
    "fifo": of_type(tarfile.FIFOTYPE),
    "directory": of_type(tarfile.DIRTYPE),
    "sparse": of_type(tarfile.GNUTYPE_SPARSE),
    "gzip bomb": compressed(bytes(20_000_000), "gz"),
    "xz bomb": compressed(bytes(20_000_000), "xz"),
    "cut off": claiming(1_000_000),
    "huge": claiming(8 * 1024**3 - 1),
    "zip": zip_with_a_way_out(Path("/tmp/escaped")),
    "noise": bytes(range(256)) * 8,
    "too large": b"\0" * (MAX_CODE_BYTES + 1),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_malicious_archive_is_refused_even_if_it_is_signed(kind: str) -> None:
    with pytest.raises(KernelError):
        unpack_archive(ARCHIVES[kind])


def test_an_archive_that_names_a_file_twice_or_too_many_is_refused() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("fn.aotc"))
    for data in (
        out.getvalue(),
        pack_archive({f"f{number}": b"" for number in range(MAX_FILES + 1)}),
    ):
        with pytest.raises(KernelError, match="duplicate name, or too many"):
            unpack_archive(data)


def test_a_valid_archive_is_read_completely() -> None:
    files = {"fn.aotc": b"code", "a/b.so": os.urandom(1000), "empty": b""}

    assert unpack_archive(pack_archive(files)) == files
    assert pack_archive(files) == pack_archive(dict(reversed(files.items())))


def test_flipped_bytes_in_an_archive_never_crash_the_reader() -> None:
    data = pack_archive({"fn.aotc": b"code" * 300, "a/b.so": b"x" * 900})
    chance = random.Random(1)
    for _ in range(3_000):
        flipped = bytearray(data)
        for _ in range(chance.randrange(1, 4)):
            flipped[chance.randrange(len(flipped))] = chance.randrange(256)
        try:
            files = unpack_archive(bytes(flipped))
        except KernelError:
            continue
        assert sum(map(len, files.values())) <= len(data)
        assert not any(name.startswith("/") or ".." in name.split("/") for name in files)


def test_a_link_in_place_of_the_code_is_not_followed_by_the_store(tmp_path: Path) -> None:
    store = KernelStore(tmp_path / "kernels")
    digest = store.put(compiled(pack_archive({"fn.aotc": b"code"})))
    code = store.path(digest) / CODE_FILE
    code.unlink()
    code.symlink_to("/dev/zero")

    with pytest.raises(KernelDigestError):
        store.get(digest)


# -- the lint -------------------------------------------------------------------------------------


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def opens_code(source: str) -> list[str]:
    """Calls, references and imports of what runs code while it loads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute | ast.Name):
            name = dotted(node)
            if any(name == bad or name.endswith(f".{bad}") for bad in RUNS_CODE):
                found.append(name)
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [n for n in names if any(n.endswith(f".{b}") or n == b for b in RUNS_CODE)]
        if isinstance(node, ast.Call):
            found += _unsafe_arguments(node)
    return found


def _unsafe_arguments(call: ast.Call) -> list[str]:
    name = dotted(call.func)
    given = {k.arg: k.value for k in call.keywords}
    safe = given.get("weights_only")
    if name == "torch.load" and not (isinstance(safe, ast.Constant) and safe.value is True):
        return ["torch.load without weights_only=True"]
    pickled = given.get("allow_pickle")
    if isinstance(pickled, ast.Constant) and pickled.value is True:
        return [f"{name}(allow_pickle=True)"]
    return []


def test_one_module_opens_code_and_no_other_does() -> None:
    guilty = {}
    for folder in CODE:
        for path in (ROOT / folder).rglob("*.py"):
            if found := opens_code(path.read_text(encoding="utf-8")):
                guilty[str(path.relative_to(ROOT))] = found

    # These two ask libc itself for prctl; CDLL(None) opens no file.
    for known in ("hosts/processes.py", "esper/compilation/confinement.py"):
        assert set(guilty.pop(known)) == {"ctypes.CDLL"}
    # The process that compiles ahead reads what the trainer that started it writes into its pipe.
    for known in ("esper/compilation/ahead.py", "esper/compilation/ahead_child.py"):
        assert set(guilty.pop(known)) == {"pickle.load"}
    assert set(guilty) == {AUDITED}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.jit.load(f)",
        "from torch.jit import load",
        "from pickle import loads as innocent",
        "import pickle\nread = pickle.loads",
        "import torch\ntorch.compiler.load_cache_artifacts(b)",
        "import numpy\nnumpy.load(f, allow_pickle=True)",
        "from torch._inductor import aoti_load_package",
        "import ctypes\nctypes.CDLL(p)",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert opens_code(source)


def test_the_audited_module_verifies_before_it_opens() -> None:
    """Whatever is loaded was taken out of a verified kernel in the same function."""
    tree = ast.parse((ROOT / AUDITED).read_text(encoding="utf-8"))
    doors = {"load_compiled": "open_compiled", "load_exported": "open_package"}
    for function in [node for node in tree.body if isinstance(node, ast.FunctionDef)]:
        if function.name in doors:
            calls = [dotted(n.func) for n in ast.walk(function) if isinstance(n, ast.Call)]
            first = function.body[1]  # after the docstring
            assert isinstance(first, ast.Assign)
            assert isinstance(first.value, ast.Call)
            assert dotted(first.value.func) == doors[function.name], calls
            doors.pop(function.name)
    assert not doors


def test_a_changed_tier_in_the_report_is_noticed() -> None:
    bundle = compiled(pack_archive({"fn.aotc": b"code"}))
    key, spec, report, code = open_compiled(bundle.files, bundle.digest, TRUSTED_KEY)
    lying = pack(
        KernelDraft(key, spec, replace(report, tier=0)), private_key=PRIVATE_KEY, code=code
    )

    with pytest.raises(KernelDigestError, match="tiers"):
        open_compiled(lying.files, lying.digest, TRUSTED_KEY)
