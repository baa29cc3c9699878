"""Builds kernels in a child process, so that a crash, hang or endless build affects only the child.

The child (:mod:`esper.compilation.child`) has imported torch before an order arrives. It has
neither the signing key nor the worker's environment; it has no network, its own directory, and
limits on time and memory. It returns data: answers on a pipe, one line of strict JSON each, and two
small files, which are read as untrusted. Imports no torch: neither this module nor the worker that
uses it touches the device.

    start ──► ready ──► order ──► steps … ──► drafted ──► (next order)
                          └─ died, too slow, too large, stopped ──► killed, the next child
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from esper.compilation.bundle import report_from_wire, spec_from_wire
from esper.contracts import CostForecast, KernelDraft, KernelKey, LayerInfo, codec
from esper.contracts.kernels import MAX_FILE_BYTES, REPORT_FILE, SPEC_FILE
from esper.exceptions import BuilderLostError, CodecError, KernelBuildError, KernelError

KEY_FILE = "key.json"
STEPS = ("forecast", "built", "certified", "measured")
MAX_ANSWER_BYTES = 256 * 1024
LAST_LINES_BYTES = 4000
LOOK_EVERY_SECONDS = 0.05
READY_SECONDS = 120.0
FOLDER = "esper-builder-"  # then the worker's process id
# The child gets only these variables of the worker's; a supervisor finds it by ESPER_UP_ID.
PASSED_ON = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONWARNINGS"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "ESPER_UP_ID"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS"),
)

OnStep = Callable[[str, CostForecast], None]


@dataclass(frozen=True, slots=True)
class BuildLimits:
    """Limits of one order: seconds, and MiB above the waiting child's memory."""

    seconds: float = 60.0
    memory_mib: int = 4096


@dataclass(frozen=True, slots=True)
class BuildOrder:
    """The kernel to build."""

    layer: LayerInfo
    blueprint: str
    config: dict[str, Any]
    capability: str

    def to_wire(self) -> dict[str, Any]:
        return {
            "layer": self.layer.to_wire(),
            "blueprint": self.blueprint,
            "config": self.config,
            "capability": self.capability,
        }

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> BuildOrder:
        return cls(
            layer=LayerInfo.from_wire(data["layer"]),
            blueprint=str(data["blueprint"]),
            config=dict(data["config"]),
            capability=str(data["capability"]),
        )


@dataclass(frozen=True, slots=True)
class BuilderDescription:
    """A ready child's description of itself; ``network`` names what blocks the network."""

    devices: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    network: str = ""


class Builder:
    """One child process. Start it in a long-lived thread: the child ends with that thread.

    Args:
        limits: for each order.
        argv: another program with the same protocol, for tests.
    """

    def __init__(self, limits: BuildLimits, argv: tuple[str, ...] = ()) -> None:
        self.limits = limits
        self.description: BuilderDescription | None = None
        self._folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-"))
        self._log = self._folder / "stderr.log"
        self._unread = b""
        self._size_at_rest_mib = 0.0
        self._orders = 0
        program = argv or (sys.executable, "-m", "esper.compilation.child")
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*program, str(os.getpid()), str(limits.memory_mib)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(self._folder),
                cwd=self._folder,
                start_new_session=True,  # so that it and its children can be killed as a group
            )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def wait_ready(self, seconds: float = READY_SECONDS) -> BuilderDescription:
        """Waits until the child has imported torch; returns its description.

        Raises:
            BuilderLostError: the child ended before.
        """
        if self.description is None:
            answer = self._answer(seconds, time.monotonic() + seconds, lambda: False)
            self.description = _description(answer)
            self._size_at_rest_mib = _resident_mib(self.process.pid)
        return self.description

    def specify(self, order: BuildOrder) -> tuple[KernelKey, CostForecast]:
        """The cache key of this order's kernel, and the forecast from its shapes.

        Raises:
            KernelBuildError: it cannot be built here, or anywhere.
            BuilderLostError: the child has ended.
        """
        answer = self._ask({"act": "specify", **order.to_wire()}, lambda: False)
        try:
            key = KernelKey.from_wire(answer["key"])
            forecast = CostForecast.from_wire(answer["forecast"])
        except (CodecError, TypeError, KeyError) as error:
            raise self._lost(f"gave an invalid answer: {error}") from error
        _check_key(key, order)
        return key, forecast

    def draft(
        self, order: BuildOrder, *, on_step: OnStep, stopped: Callable[[], bool]
    ) -> KernelDraft:
        """Builds, certifies and measures the kernel in the child.

        Args:
            on_step: called after each step; an exception in it ends the build.
            stopped: called repeatedly; True ends the build and the child.

        Raises:
            KernelBuildError: the child refused the order, or the result does not match it.
            BuilderLostError: the child died, exceeded a limit, or was stopped.
        """
        self._orders += 1
        folder = self._folder / f"order-{self._orders}"
        folder.mkdir(mode=0o700)
        try:
            message = {"act": "draft", "folder": str(folder), **order.to_wire()}
            self._note_devices(self._ask(message, stopped, on_step))
            draft = _read_draft(folder)
        except (CodecError, KernelError, TypeError, KeyError, OSError) as error:
            if isinstance(error, KernelBuildError):
                raise
            raise self._lost(f"wrote files that are not a kernel: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        _check_draft(draft, order)
        return draft

    def close(self) -> None:
        """Ends the child and all its processes, and removes its directory."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # nothing reads the buffer any more
                    pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ask(
        self,
        message: Mapping[str, Any],
        stopped: Callable[[], bool],
        on_step: OnStep = lambda _step, _forecast: None,
    ) -> dict[str, Any]:
        self.wait_ready()
        self._say(message)
        deadline = time.monotonic() + self.limits.seconds
        while True:
            answer = self._answer(self.limits.seconds, deadline, stopped)
            if answer.get("answer") == "step":
                self._pass_on(answer, on_step)
            elif answer.get("answer") == "failed":
                error = str(answer.get("error"))[:LAST_LINES_BYTES]
                raise KernelBuildError(error, permanent=answer.get("permanent") is True)
            else:
                return answer

    def _pass_on(self, answer: dict[str, Any], on_step: OnStep) -> None:
        try:
            step, forecast = str(answer["step"]), CostForecast.from_wire(answer["forecast"])
        except (CodecError, TypeError, KeyError) as error:
            raise self._lost(f"gave an invalid answer: {error}") from error
        if step not in STEPS:
            raise self._lost(f"reported the unknown step {step[:40]!r}")
        try:
            on_step(step, forecast)
        except BaseException:
            self.close()  # its present order is no longer wanted
            raise

    def _note_devices(self, answer: dict[str, Any]) -> None:
        assert self.description is not None  # it was ready before it received an order
        self.description = replace(self.description, devices=_description(answer).devices)

    def _say(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(codec.encode(dict(message)) + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise self._lost("died before it read the order") from error

    def _answer(
        self, seconds: float, deadline: float, stopped: Callable[[], bool]
    ) -> dict[str, Any]:
        """The next line, unless a limit is reached or the build is stopped."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self._unread:
            if time.monotonic() > deadline:
                raise self._lost(f"did not finish within {seconds:g} s and was killed")
            if stopped():
                raise self._lost("was stopped, because its result is no longer needed", wanted=True)
            self._watch_memory()
            if not select.select([descriptor], [], [], LOOK_EVERY_SECONDS)[0]:
                continue
            read = os.read(descriptor, 65536)
            if not read:
                raise self._lost("died")
            self._unread += read
            if len(self._unread) > MAX_ANSWER_BYTES:
                raise self._lost("wrote too much output and was killed")
        line, _, self._unread = self._unread.partition(b"\n")
        return self._parsed(line)

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            answer = codec.decode(line, max_bytes=MAX_ANSWER_BYTES)
        except CodecError as error:
            raise self._lost(f"gave an invalid answer: {error}") from error
        if not isinstance(answer, dict):
            raise self._lost("gave an invalid answer: no object")
        return answer

    def _watch_memory(self) -> None:
        if not self._size_at_rest_mib:
            return
        grown = _resident_mib(self.process.pid) - self._size_at_rest_mib
        if grown > self.limits.memory_mib:
            raise self._lost(
                f"took {grown:.0f} MiB, at most {self.limits.memory_mib} MiB, and was killed"
            )

    def _lost(self, what: str, *, wanted: bool = False) -> BuilderLostError:
        """Ends the child, and describes its end."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0.2)  # a dying child gets time to exit by itself
        ended = self.process.returncode
        tail = _tail(self._log)
        self.close()
        if ended is not None:
            what = f"{what} ({describe_exit(ended)})"
        return BuilderLostError(f"the builder {what}", log=tail, wanted=wanted)


class BuilderPool:
    """A pool of ready children: one builds, the others wait to replace it.

    Args:
        size: number of children; with one, a lost child must be replaced first.
    """

    def __init__(self, limits: BuildLimits, size: int = 2, argv: tuple[str, ...] = ()) -> None:
        self._limits, self._size, self._argv = limits, size, argv
        self._builders: list[Builder] = []
        _remove_leftovers()

    def ready(self) -> Builder:
        """The child for the next order; waits for the first child after the start.

        Raises:
            BuilderLostError: no child starts.
        """
        for attempt in range(self._size + 1):
            self._fill(1)
            try:
                self._builders[0].wait_ready()
            except BuilderLostError:
                if attempt == self._size:
                    raise
                continue
            self._fill(self._size)  # not earlier: two children that import torch are half as fast
            return self._builders[0]
        raise AssertionError("the last attempt returns or raises")

    def _fill(self, size: int) -> None:
        """Returns at once; the child imports torch in the background."""
        self._builders = [builder for builder in self._builders if self._is_alive(builder)]
        while len(self._builders) < size:
            self._builders.append(Builder(self._limits, self._argv))

    def close(self) -> None:
        for builder in self._builders:
            builder.close()
        self._builders.clear()

    def _is_alive(self, builder: Builder) -> bool:
        if builder.alive:
            return True
        builder.close()
        return False


def describe_exit(code: int) -> str:
    """``exit code 1`` or ``killed by SIGKILL``."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    # The child runs in another directory, so relative paths must become absolute.
    kept["PYTHONPATH"] = os.pathsep.join(str(Path(entry or ".").resolve()) for entry in sys.path)
    return {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **kept, "TMPDIR": str(folder)}


def _remove_leftovers() -> None:
    """Removes directories of workers that were killed before they could do so."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        pid = folder.name.removeprefix(FOLDER).partition("-")[0]
        if sys.platform == "linux" and not Path("/proc", pid).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _description(answer: dict[str, Any]) -> BuilderDescription:
    devices = [dict(device) for device in answer.get("devices", []) if isinstance(device, dict)]
    versions = {str(name): str(value) for name, value in answer.get("versions", {}).items()}
    return BuilderDescription(devices, versions, str(answer.get("network", "")))


def _read_draft(folder: Path) -> KernelDraft:
    read = {name: _read_file(folder / name) for name in (KEY_FILE, SPEC_FILE, REPORT_FILE)}
    return KernelDraft(
        key=KernelKey.from_wire(read[KEY_FILE]),
        spec=spec_from_wire(read[SPEC_FILE]),
        report=report_from_wire(read[REPORT_FILE]),
    )


def _read_file(path: Path) -> Any:
    # With a link the child could choose which file its worker reads and signs.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        return codec.decode(file.read(MAX_FILE_BYTES + 1), max_bytes=MAX_FILE_BYTES)


def _check_key(key: KernelKey, order: BuildOrder) -> None:
    asked = (order.layer.in_shape, order.layer.out_shape, order.layer.dtype, order.capability)
    if (key.in_shape, key.out_shape, key.dtype, key.capability) != asked:
        raise KernelBuildError("the builder answered for another layer", permanent=False)
    if key.layer_kind.split(" ")[0] != order.layer.kind or key.blueprint != order.blueprint:
        raise KernelBuildError("the builder answered for another order", permanent=False)
    if any(key.config.get(name) != value for name, value in order.config.items()):
        raise KernelBuildError("the builder used another configuration", permanent=False)


def _check_draft(draft: KernelDraft, order: BuildOrder) -> None:
    """Checks that the draft matches the order and has a certificate that passed."""
    _check_key(draft.key, order)
    named = (draft.key.blueprint, draft.key.blueprint_version, draft.key.config)
    if named != (draft.spec.blueprint, draft.spec.blueprint_version, draft.spec.config):
        raise KernelBuildError("key and spec name different blueprints", permanent=False)
    certificate = draft.report.certificate
    kept = certificate.preserving and certificate.live and certificate.rng_neutral
    if not certificate.passed or not kept or draft.report.tier != 0:
        raise KernelBuildError("the builder's certificate did not pass", permanent=True)


def _resident_mib(pid: int) -> float:
    """Resident memory; 0 if unknown."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGESIZE") / (1 << 20)


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LAST_LINES_BYTES))
            return file.read().decode(errors="replace").replace("\0", "").strip()
    except OSError:
        return ""
