"""Rights that a builder child drops before it builds: network, unlimited memory, core dumps.

The network is closed by a seccomp filter, which needs no rights and applies to all code in the
process: ``socket`` works only for local (AF_UNIX) sockets. Without such a filter, a Python audit
hook refuses sockets; native code could bypass it, so the child reports which of the two is active.
The rest is no sandbox: a builder reads files with its user's rights.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

MIB = 1 << 20
LOWEST_PRIORITY = 19
_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
# Audit architecture, and the numbers of socket and io_uring_setup (which could open a socket too).
_ARCHITECTURES = {"x86_64": (0xC000003E, 41, 425), "aarch64": (0xC00000B7, 198, 425)}
_X32_CALL = 0x40000000  # x86_64 has a second number for each call
_ALLOW, _EACCES, _KILL = 0x7FFF0000, 0x0005000D, 0x80000000
# Classic BPF: load a word of seccomp_data at an offset, jump if equal or greater, return.
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_AT_CALL, _AT_ARCHITECTURE, _AT_FIRST_ARGUMENT = 0, 4, 16


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def end_with_parent(parent: int) -> None:
    """Ends this process when the worker ends; makes it the first to be killed without memory."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the worker ended before this call
        os._exit(1)


def run_when_idle() -> None:
    """Gives this process, and what it starts, only the time of processors that nobody else wants.

    Under Linux's idle policy a process waits for every other one, and is interrupted at once. Where
    there is no such policy, the lowest priority. Threads that run already keep their policy.
    """
    os.nice(LOWEST_PRIORITY)
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):  # a system without it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def close_network() -> str:
    """Refuses all but local sockets from now on; returns the means: seccomp or audit hook."""
    if _seccomp():
        return "seccomp"
    sys.addaudithook(_refuse_connections)
    return "audit hook"


def limit_memory(memory_mib: int) -> None:
    """Limits this process's growth, so that a build that is too large fails with an error.

    The limit is on address space, which a CUDA context reserves without use: for a child with a GPU
    only the parent's check of resident memory applies.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux" or Path("/dev/nvidiactl").exists():
        return
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = size + memory_mib * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def die_first() -> None:
    """Without free memory, the kernel kills a builder before a worker or a trainer."""
    if sys.platform == "linux":
        Path("/proc/self/oom_score_adj").write_text("800")


def _seccomp() -> bool:
    numbers = _ARCHITECTURES.get(platform.machine())
    if sys.platform != "linux" or numbers is None:
        return False
    program = _filter(*numbers)
    library = ctypes.CDLL(None, use_errno=True)
    loaded = _Program(len(program) // 8, program)
    return not (
        library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        or library.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(loaded))
    )


def _filter(architecture: int, socket_call: int, io_uring_setup: int) -> bytes:
    return b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (_LOAD, 0, 0, _AT_ARCHITECTURE),
            (_IF_EQUAL, 1, 0, architecture),
            (_RETURN, 0, 0, _KILL),
            (_LOAD, 0, 0, _AT_CALL),
            (_IF_AT_LEAST, 5, 0, _X32_CALL),
            (_IF_EQUAL, 4, 0, io_uring_setup),
            (_IF_EQUAL, 0, 2, socket_call),
            (_LOAD, 0, 0, _AT_FIRST_ARGUMENT),
            (_IF_EQUAL, 0, 1, socket.AF_UNIX),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _EACCES),
        )
    )


def _refuse_connections(event: str, arguments: tuple[Any, ...]) -> None:
    if event in {"socket.connect", "socket.bind", "socket.sendto"}:
        raise PermissionError(f"a builder has no network: {event}")
