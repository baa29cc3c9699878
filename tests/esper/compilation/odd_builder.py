"""A builder child that fails as the ordered layer's name says; the real one for ``fc``."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from esper import compilation
from esper.compilation import child, confinement
from esper.contracts import LayerInfo
from esper.contracts.kernels import SPEC_FILE
from esper.exceptions import KernelBuildError

real_draft, real_write = compilation.draft_kernel, child._write


def segfault() -> None:
    sys.stderr.write("the last words\n")
    sys.stderr.flush()
    ctypes.string_at(0)


def frozen() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def endless() -> None:
    while True:
        time.sleep(0.01)


def greedy() -> None:
    torch.zeros(300 << 20, dtype=torch.uint8)


def hoarding() -> None:
    kept = [torch.ones(32 << 20, dtype=torch.uint8) for _ in range(20)]
    time.sleep(30)
    kept.clear()


def curious() -> None:
    """Raises with what it found, so that the worker hears of it."""
    found = {name for name in os.environ if name.startswith(("ESPER_KERNEL", "SECRET"))}
    try:
        socket.create_connection(("127.0.0.1", 1), timeout=1)
    except PermissionError:
        pass  # not ConnectionRefusedError: it never left the process
    else:
        found.add("network")
    raise KernelBuildError(f"found {sorted(found)}, in {Path.cwd()}", permanent=True)


def chatty() -> None:
    sys.stdout.write('{"answer":"drafted"}\n')
    sys.stdout.flush()


def forged_certificate(draft: Any, folder: Path) -> None:
    certificate = replace(draft.report.certificate, live=False)
    real_write(replace(draft, report=replace(draft.report, certificate=certificate)), folder)


def other_blueprint(draft: Any, folder: Path) -> None:
    real_write(replace(draft, spec=replace(draft.spec, blueprint="proj_ia3")), folder)


def other_capability(draft: Any, folder: Path) -> None:
    real_write(replace(draft, key=replace(draft.key, capability="cuda.sm90")), folder)


def linked(draft: Any, folder: Path) -> None:
    real_write(draft, folder)
    (folder / SPEC_FILE).rename(folder / "elsewhere")
    (folder / SPEC_FILE).symlink_to(folder / "elsewhere")


def garbage(draft: Any, folder: Path) -> None:
    real_write(draft, folder)
    (folder / SPEC_FILE).write_bytes(b"\x80\x04cos\nsystem\n")


def draft(layer: LayerInfo, *arguments: Any, **options: Any) -> Any:
    act = globals().get(layer.name, lambda: None)
    writes = bool(act.__code__.co_argcount)
    child._write = act if writes else real_write
    if not writes:
        act()
    return real_draft(layer, *arguments, **options)


if __name__ == "__main__":
    if sys.argv[1] == "--unlimited":  # as beside a GPU, where only the worker's watch is left
        confinement.limit_memory = lambda memory_mib: None
        del sys.argv[1]
    compilation.draft_kernel = draft  # type: ignore[attr-defined]
    child.main()
