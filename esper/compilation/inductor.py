"""Tier 1: a graft's forward and backward as machine code, compiled by Inductor in a child.

worker (holds the signing key)   child: nice 19, one thread, an empty cache directory, no key
  build_compiled ───── spec ─────►  build the graft, compile, compare, time
        sign     ◄─ report, inductor.tar ─┘

Never in a thread of a trainer, because its steps would take several times as long, and never in the
worker's own process, which must build the next tier 0 kernel.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esper import blueprints, grafting
from esper.blueprints import Graft
from esper.compilation.archive import pack_archive
from esper.compilation.build import build_kernel
from esper.compilation.bundle import pack, report_from_wire, spec_from_wire
from esper.compilation.instantiate import instantiate
from esper.compilation.key import kernel_key
from esper.compilation.native import (
    CACHE_VARIABLE,
    FUNCTION_FILE,
    CompiledGraft,
    portable_code,
)
from esper.compilation.trial import sample, try_compiled
from esper.contracts import (
    GraftKind,
    KernelBundle,
    KernelDraft,
    KernelKey,
    KernelSpec,
    LayerInfo,
    codec,
)
from esper.contracts.kernels import MAX_CODE_BYTES, REPORT_FILE, SPEC_FILE
from esper.exceptions import CompilerMissingError, EsperError, KernelBuildError

TIMEOUT_SECONDS = 300.0
NICENESS = 19
_KEPT = frozenset(
    {".so", ".py", ".cubin", ".json"}
)  # files that loading needs, without locks and sources
_NOTHING_TO_GAIN = frozenset({GraftKind.WRAP, GraftKind.OBSERVE})


def compiled_key(layer: LayerInfo, blueprint: str, config: dict[str, Any] | None) -> KernelKey:
    """The key of the compiled kernel; see :func:`esper.compilation.kernel_key`."""
    return replace(kernel_key(layer, blueprint, config), tier=1)


def build_compiled(
    layer: LayerInfo,
    blueprint: str,
    config: dict[str, Any] | None = None,
    *,
    private_key: str,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> KernelBundle:
    """Compile, compare with eager, time, package and sign. Seconds to minutes.

    Args:
        layer, blueprint, config, private_key: as :func:`esper.compilation.build_kernel`.
        timeout_seconds: the child is killed after that.

    Returns:
        The signed files; ``report.json`` has the speedup on this machine. The trainer measures on
        its own device whether that is enough.

    Raises:
        CompilerMissingError: this machine cannot compile for the device.
        KernelBuildError: permanent: the graft cannot be compiled, or the result differs.
    """
    first = build_kernel(layer, blueprint, config, private_key=private_key)
    spec = spec_from_wire(codec.decode(first.files[SPEC_FILE]))
    report = report_from_wire(codec.decode(first.files[REPORT_FILE]))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="esper-inductor-") as name:
        answer = _run_child(layer, spec, Path(name), timeout_seconds)
        code = (Path(name) / "inductor.tar").read_bytes()
    stage_ms = {**report.stage_ms, **answer["stage_ms"]}
    stage_ms["child"] = round((time.perf_counter() - started) * 1e3, 3)
    report = replace(report, tier=1, speedup=float(answer["speedup"]), stage_ms=stage_ms)
    key = compiled_key(layer, spec.blueprint, spec.config)
    return pack(KernelDraft(key, spec, report), private_key=private_key, code=code)


def _run_child(layer: LayerInfo, spec: KernelSpec, directory: Path, timeout: float) -> Any:
    (directory / "request.json").write_bytes(
        codec.encode({"layer": layer.to_wire(), "spec": _spec_to_wire(spec)})
    )
    log = directory / "log"
    with log.open("wb") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "esper.compilation.inductor", str(directory)],
            env=_child_environment(directory),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
    try:
        child.wait(timeout)
    except subprocess.TimeoutExpired as error:
        raise KernelBuildError(
            f"compiling took longer than {timeout:g} s", permanent=True
        ) from error
    finally:
        _end_group(child)
    try:
        answer = codec.decode((directory / "answer.json").read_bytes())
    except OSError as error:
        tail = log.read_text(errors="replace").strip()[-2000:]
        raise KernelBuildError(f"the compiler's process died: {tail}", permanent=True) from error
    if answer["missing"]:
        raise CompilerMissingError(answer["error"])
    if answer["error"]:
        raise KernelBuildError(answer["error"], permanent=True)
    return answer


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """Kills the child and its compilers."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _child_environment(directory: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if "KEY" not in name}
    root = str(Path(__file__).resolve().parents[2])
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        CACHE_VARIABLE: str(directory / "cache"),
    }


def _spec_to_wire(spec: KernelSpec) -> dict[str, Any]:
    return {
        "blueprint": spec.blueprint,
        "blueprint_version": spec.blueprint_version,
        "config": spec.config,
        "seed": spec.seed,
    }


# -- in the child ----------------------------------------------------------------------------------


def main(directory: Path) -> None:
    """Compiles the graft of ``request.json``; writes ``answer.json`` and ``inductor.tar``."""
    os.nice(NICENESS)
    torch.set_num_threads(1)
    answer: dict[str, Any] = {"error": "", "missing": False, "speedup": "nan", "stage_ms": {}}
    try:
        request = codec.decode((directory / "request.json").read_bytes())
        layer = LayerInfo.from_wire(request["layer"])
        answer |= _compile(layer, spec_from_wire(request["spec"]), directory)
    except CompilerMissingError as error:
        answer |= {"error": str(error), "missing": True}
    except EsperError as error:
        answer["error"] = str(error)
    (directory / "answer.json").write_bytes(codec.encode(answer))


def _compile(layer: LayerInfo, spec: KernelSpec, directory: Path) -> dict[str, Any]:
    if blueprints.get_blueprint(spec.blueprint).kind in _NOTHING_TO_GAIN:
        raise KernelBuildError(
            f"{spec.blueprint} computes nothing that could be faster", permanent=True
        )
    graft = _settled(instantiate(spec, layer), layer)
    started = time.perf_counter()
    function = compile_combine(graft, layer)
    compile_ms = (time.perf_counter() - started) * 1e3
    key = compiled_key(layer, spec.blueprint, spec.config)
    trial = try_compiled(graft, CompiledGraft(function, key), layer)
    if not trial.equal:
        raise KernelBuildError(trial.text, permanent=True)
    cache = directory / "cache"
    function.save_compiled_function(str(cache / FUNCTION_FILE))
    code = pack_archive(_code_files(cache))
    if len(code) > MAX_CODE_BYTES:
        raise KernelBuildError(f"{len(code)} bytes of code exceed the limit", permanent=True)
    (directory / "inductor.tar").write_bytes(code)
    return {"speedup": trial.speedup, "stage_ms": {"inductor": round(compile_ms, 3)}}


def _settled(graft: Graft, layer: LayerInfo) -> Graft:
    """The graft as in its slot: with values inherited from the host, in training mode."""
    host: nn.Module = grafting.stand_in(layer)[0]
    graft.inherit(host)
    return graft.train()


def compile_combine(graft: Graft, layer: LayerInfo) -> Any:
    """Inductor's forward and backward of ``type(graft).combine``, for any instance of this shape.

    Raises:
        CompilerMissingError: no C++ compiler (CPU), or no Triton (GPU).
        KernelBuildError: permanent: PyTorch cannot compile this graft in one piece.
    """
    from torch._inductor.exc import InvalidCxxCompiler, TritonMissing

    x, y = sample(layer)
    try:
        # Off by default in torch 2.10, where the result has no ``aot_compile`` then.
        with portable_code(), torch._dynamo.config.patch(enable_aot_compile=True):
            compiled: Any = torch.compile(type(graft).combine, fullgraph=True, dynamic=False)
            return compiled.aot_compile(((graft, x, y), {}))
    except Exception as error:  # PyTorch's compiler can raise any exception
        for cause in _causes(error):
            if isinstance(cause, InvalidCxxCompiler | TritonMissing):
                raise CompilerMissingError(
                    f"compiled kernels are unavailable on this machine: {cause}"
                ) from error
        text = f"PyTorch cannot compile it: {type(error).__name__}: {error}"
        raise KernelBuildError(text[:500], permanent=True) from error


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = getattr(current, "inner_exception", None) or current.__cause__
    return chain


def _code_files(cache: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and (path.suffix in _KEPT or path.name == FUNCTION_FILE)
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
