"""Compiling a graft's new code beside the training, before the graft comes.

A graft in compiled code means one recompilation, in the training thread, at the next step. Nearly
all of its time is spent by Inductor, whose results are kept on disk under the hash of the graph.
So a process at the lowest priority compiles the same graph first: the trainer then traces its model
again, and loads the rest.

    trainer                           the process
    region, graft, inputs as forms -> builds them from blank tensors of the same form
                                      compiles forward and backward, into the cache on disk
                                   <- how long it took, and how long it takes with the cache
    grafts at the next step boundary

What is sent holds no weights: of each tensor its shape, strides, dtype, device.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from esper.contracts import LayerInfo
from esper.fail_closed import short
from esper.grafting.compiled import Region
from esper.grafting.hooks import PassingHook
from esper.grafting.layers.eager_pass import why_not_copied

PROGRAM = "-m", "esper.compilation.ahead_child"
MAX_ORDER_BYTES = 64 << 20
CUDA_RESERVE_BYTES = 1 << 30  # for the context of one more process
KEPT_VALUES = 64  # smaller tensors keep their values: masks, flags, sizes
_MEMORY_MARGIN = 1.25
_LAST_LINES = 2000  # characters of a failed process's output
SETTINGS = ("torch._dynamo.config", "torch._functorch.config", "torch._inductor.config")
BACKEND_FLAGS = (
    # Not torch.set_float32_matmul_precision: it has two ways to say "highest", and two keys.
    "backends.cuda.matmul.fp32_precision",
    "backends.cudnn.conv.fp32_precision",
    "backends.cudnn.rnn.fp32_precision",
    "backends.mkldnn.matmul.fp32_precision",
    "backends.cudnn.benchmark",
    "backends.cudnn.deterministic",
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
)
_HOOKS_OF_STATES = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class NotPreparedError(Exception):
    """A recompilation cannot be prepared here; the message is the reason."""


@dataclass(frozen=True, slots=True)
class RegionCall:
    """One call of a compiled region: what decides which code is compiled.

    Attributes:
        args, kwargs: its arguments; only the form of a tensor is used.
        gradients: a graph for the backward pass was kept.
        autocast: (device type, dtype, weights are cached), None without autocast.
        training: the region was in train mode.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gradients: bool
    autocast: tuple[str, torch.dtype, bool] | None
    training: bool

    @classmethod
    def of(cls, region: Region, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RegionCall:
        """Reads the present call. Its tensors are replaced by blank ones, and are not kept."""
        given: Any = args, dict(kwargs)
        device = _device_of(region.module)
        narrowed = torch.is_autocast_enabled(device)
        autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled())
        positional, named = torch.utils._pytree.tree_map_only(Tensor, _Form.of, given)
        return cls(
            positional,
            named,
            gradients=torch.is_grad_enabled(),
            autocast=autocast if narrowed else None,
            training=region.module.training,
        )


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the process answered.

    Attributes:
        reason: why the code is not compiled; empty where it is.
        cold_seconds: compiling took so long.
        warm_seconds: processor time of the same once more, with the cache: about what the trainer
            will wait.
    """

    reason: str = ""
    cold_seconds: float = float("nan")
    warm_seconds: float = float("nan")


class Preparation:
    """One process that compiles a graft's code; :meth:`poll` it, and :meth:`close` it.

    Args:
        region: the compiled part that contains the layer.
        call: what the training calls it with.
        layer: with its name in the model.
        evaluates: the run evaluates its model too, without gradients.

    Raises:
        NotPreparedError: it cannot be done here; nothing was started.
    """

    def __init__(
        self,
        region: Region,
        call: RegionCall,
        layer: LayerInfo,
        blueprint: str,
        config: dict[str, Any],
        *,
        seed: int = 0,
        evaluates: bool = False,
    ) -> None:
        self._refuse(region, layer)
        inside = replace(
            layer,
            name=region.inside(layer.name),
            since=region.inside(layer.since) if layer.since else "",
        )
        order = {
            "settings": _settings_of(region),
            "region": region.module,
            "call": call,
            "layer": inside,
            "blueprint": blueprint,
            "config": config,
            "seed": seed,
            "evaluates": evaluates,
        }
        state = pickle.dumps(_process_state(_memory_bytes(region.module)))
        self._start(state + _packed(order))

    def _start(self, order: bytes) -> None:
        self._order: Any = None
        self._answer: Any = None
        try:
            # Files without a name: nothing is left of them, however the trainer ends.
            self._order = tempfile.TemporaryFile()  # noqa: SIM115 - the process has it open
            self._answer = tempfile.TemporaryFile()  # noqa: SIM115
            self._order.write(order)
            self._order.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, *PROGRAM, str(os.getpid())],
                stdin=self._order,
                stdout=self._answer,
                stderr=subprocess.STDOUT,
                env=_environment(),
                # So that it and the C++ compiler are killed together. No session of its own: Linux
                # shares processors among sessions first, whatever the priorities inside of them.
                process_group=0,
            )
        except OSError as error:
            self._close_files()
            raise NotPreparedError(f"no process can be started: {error}") from error

    def poll(self) -> Prepared | None:
        """What it answered; None while it compiles. Never waits."""
        status = self._process.poll()
        if status is None:
            return None
        with suppress(OSError, ValueError):
            self._answer.seek(0)
            text = self._answer.read().decode(errors="replace").strip()
            lines = text.rsplit("\n", 1)
            if status == 0:
                return Prepared(**json.loads(lines[-1]))
            return Prepared(f"the process ended with status {status}: {text[-_LAST_LINES:]}")
        return Prepared("the process left no answer")

    def close(self) -> None:
        """Ends the process, if it still runs, and what it has started."""
        if self._process.poll() is None:
            with suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._close_files()

    def _close_files(self) -> None:
        for file in (self._order, self._answer):
            if file is not None:
                with suppress(OSError):  # of a full disk, whose last bytes are written now
                    file.close()

    @staticmethod
    def _refuse(region: Region, layer: LayerInfo) -> None:
        reason = ""
        if sys.platform == "win32":
            reason = "it needs process groups, which Windows does not have"
        elif layer.since and not layer.since.startswith(region.name):
            reason = f"{layer.since} is compiled apart from {layer.name}"
        reason = reason or why_not_copied(region.module) or why_no_cache()
        if reason:
            raise NotPreparedError(reason)


def why_no_cache() -> str:
    """Why torch.compile keeps nothing on disk in this process; empty: it does."""
    from torch._inductor import config

    off = getattr(config, "force_disable_caches", False) or not config.fx_graph_cache
    return "torch.compile's cache on disk is switched off in this process" if off else ""


# -- what torch.compile was told ------------------------------------------------------------------


def _settings_of(region: Region) -> dict[str, Any]:
    """How the region was compiled: arguments for torch.compile, and the way it was called."""
    entry: Any = region.entry
    wrapped = getattr(entry, "_orig_mod", None)
    if wrapped is not None and wrapped is not region.module:
        raise NotPreparedError(
            f"torch.compile compiles a {type(wrapped).__name__} around the model; compile the "
            "model itself, and wrap the result"
        )
    context = entry.dynamo_ctx if wrapped is not None else _context_of(entry._compiled_call_impl)
    backend: Any = getattr(context, "callback", None)
    while (inner := getattr(backend, "_torchdynamo_orig_backend", None)) is not None:
        backend = inner
    if type(backend).__name__ != "_TorchCompileInductorWrapper":
        name = getattr(backend, "__name__", type(backend).__name__)
        raise NotPreparedError(f"the backend {name!r} keeps no compiled code on disk")
    return {
        "in_place": wrapped is None,
        "dynamic": backend.dynamic,
        "options": dict(backend.config) or None,
    }


def _context_of(compiled: Any) -> Any:
    """The context of ``module.compile()``, which its function remembers."""
    compiled = getattr(compiled, "compiled_call", compiled)
    cells = getattr(getattr(compiled, "get_compiler_config", None), "__closure__", None) or ()
    found = [cell.cell_contents for cell in cells]
    return next((held for held in found if hasattr(held, "callback")), None)


def _process_state(memory_bytes: int) -> dict[str, Any]:
    """What else decides which code is compiled: settings of the process, in plain values."""
    return {
        "path": [entry or os.getcwd() for entry in sys.path],
        "memory_bytes": memory_bytes,
        "configs": {name: import_module(name).save_config() for name in SETTINGS},
        # pickle names this constant by the first module that has ``torch``, and the cache hashes
        # what pickle writes.
        "home_of_torch": _home_of(torch.contiguous_format, "torch.contiguous_format"),
        "threads": torch.get_num_threads(),
        "default_dtype": torch.get_default_dtype(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "backends": {name: attrgetter(name)(torch) for name in BACKEND_FLAGS},
    }


def _home_of(value: object, name: str) -> str:
    """The module by which pickle names a value."""
    found: str = getattr(pickle, "whichmodule")(value, name)  # noqa: B009 - has no type
    return found


def _environment() -> dict[str, str]:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    esper_root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH", "")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (inherited, esper_root))),
        "TORCHINDUCTOR_CACHE_DIR": cache_dir(),
        # Processes of its own would outlive it, and are no part of the cache's key.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # The code is made for as many threads as the trainer has, and tried with one.
        "OMP_THREAD_LIMIT": "1",
        "OMP_WAIT_POLICY": "passive",
        "ESPER_SERVER": "",
    }


def _memory_bytes(module: nn.Module) -> int:
    """How much memory the process may take; raises where the training would suffer.

    It holds the region's parameters, their gradients and the activations of one step: less than
    the trainer has taken at its peak.
    """
    if _device_of(module) == "cuda":
        index = next(p.device.index for p in module.parameters() if p.is_cuda)
        free, _ = torch.cuda.mem_get_info(index)
        needed = torch.cuda.max_memory_allocated(index) + CUDA_RESERVE_BYTES
        if free < needed:
            raise NotPreparedError(
                f"the GPU has {free >> 20} MiB free, and one more step of the model may take "
                f"{needed >> 20}"
            )
        return needed
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if _IS_MAC else 10)
    needed, free = int(peak * _MEMORY_MARGIN), _free_memory()
    if free < needed:
        raise NotPreparedError(
            f"the machine has {free >> 20} MiB free, and compiling may take {needed >> 20}"
        )
    return needed


_IS_MAC = sys.platform == "darwin"


def _free_memory() -> int:
    with suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text()
        return int(text.split("MemAvailable:")[1].split()[0]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _device_of(module: nn.Module) -> str:
    return next((p.device.type for p in module.parameters()), "cpu")


# -- sending the region without its weights -------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Form:
    """A tensor without its values; small ones keep them."""

    kind: type
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str
    requires_grad: bool
    values: Any = None

    @classmethod
    def of(cls, tensor: Tensor) -> _Form:
        kind = type(tensor)
        if kind not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout is not torch.strided:
            raise NotPreparedError(f"the model has a tensor of class {kind.__name__}")
        small = tensor.device.type == "cpu" and tensor.numel() <= KEPT_VALUES
        plain = small and not isinstance(tensor, nn.Parameter)
        return cls(
            kind,
            tuple(tensor.shape),
            tuple(tensor.stride()),
            tensor.dtype,
            str(tensor.device),
            tensor.requires_grad,
            tensor.detach().tolist() if plain else None,
        )

    def tensor(self) -> Tensor:
        """A tensor of this form; zeros, so that an index stays inside of its table."""
        size = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        count = size if all(self.shape) else 0
        flat = torch.zeros(count, dtype=self.dtype, device=self.device)
        made = flat.as_strided(self.shape, self.stride)
        if self.values is not None:
            made.copy_(torch.tensor(self.values, dtype=self.dtype, device="cpu").view(self.shape))
        if self.kind is nn.Parameter:
            return nn.Parameter(made, requires_grad=self.requires_grad)
        if self.kind is nn.Buffer:
            return nn.Buffer(made)
        return made.requires_grad_(self.requires_grad)


def blanks(value: Any) -> Any:
    """A tree with tensors in the place of their forms."""
    return torch.utils._pytree.tree_map_only(_Form, _Form.tensor, value)


def _rebuilt(form: _Form) -> Tensor:
    return form.tensor()


class _Full(OSError):
    """The order is too large."""


class _Bounded(io.BytesIO):
    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > MAX_ORDER_BYTES:
            raise _Full(f"it takes more than {MAX_ORDER_BYTES >> 20} MiB without its weights")
        return super().write(data)


def _packed(order: dict[str, Any]) -> bytes:
    """The order as bytes; classes and functions of the script itself are in it, by value."""
    try:
        import cloudpickle
    except ImportError as error:
        raise NotPreparedError("it needs cloudpickle: pip install cloudpickle") from error

    class Packer(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, Tensor):
                return _rebuilt, (_Form.of(value),)
            if isinstance(value, nn.Module):
                return _reduced(value)
            return super().reducer_override(value)

    buffer = _Bounded()
    try:
        Packer(buffer).dump(order)
    except NotPreparedError:
        raise
    except Exception as error:
        raise NotPreparedError(f"the model cannot be sent to a process: {short(error)}") from error
    return buffer.getvalue()


def _reduced(module: nn.Module) -> Any:
    """A module without the hooks that no forward pass runs, and without Esper's own."""
    reduced: Any = module.__reduce_ex__(2)
    if len(reduced) < 3 or not isinstance(reduced[2], dict):
        return reduced
    state = {name: value for name, value in reduced[2].items() if name != "_compiled_call_impl"}
    for name in _HOOKS_OF_STATES:
        if name in state:
            state[name] = type(state[name])()
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        if name in state:
            kept = [(k, h) for k, h in state[name].items() if not isinstance(h, PassingHook)]
            state[name] = type(state[name])(kept)
    return *reduced[:2], state, *reduced[3:]


def results_with_gradients(output: Any) -> list[Tensor]:
    """The tensors of an output that a backward pass can begin at."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.requires_grad]


def load_order(stream: BinaryIO) -> Any:
    """The rest of an order, in a process whose state is already that of the trainer."""
    return pickle.load(stream)  # noqa: S301 - from the trainer that started this process
