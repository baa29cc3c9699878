"""From a chosen candidate to a graft in a model of this process: kernel, checks, surgery.

Ports, each with an in-process default: a compiler builds kernels, a store keeps them, a dispatcher
grafts them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from esper.blueprints import get_blueprint
from esper.compilation.instantiate import instantiate
from esper.compilation.key import kernel_key
from esper.compilation.verify import open_kernel
from esper.contracts import Decision, KernelBundle, KernelReport, KernelSpec, LayerInfo
from esper.contracts.signing import generate_private_key, public_key
from esper.exceptions import ConfigurationError, KernelError

if TYPE_CHECKING:  # else the service, which grafts nothing itself, would import torch's compiler
    from esper.grafting import Receipt


@dataclass(frozen=True, slots=True, eq=False)
class ModelState:
    """A model that may be adapted, as it is now.

    Attributes:
        model: None only where ``run`` names a run of a server.
        optimizer: gets the graft's parameters; None: they are not trained.
        sample: an input of the model (a tensor, a tuple of arguments or a dict of keywords); one
            forward pass tells the layers' shapes. Not needed with ``layers``. With neither, only
            what the modules tell of themselves is known.
        layers: from ``session.layers`` or ``grafting.trace_layers``.
        step: optimizer steps so far; cooldowns count these.
        run: uid of a run, for an orchestrator that works through a server.
    """

    model: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    sample: Any = None
    layers: tuple[LayerInfo, ...] = ()
    step: int = 0
    run: str = ""
    scheduler: Any = None
    scaler: Any = None

    @classmethod
    def of(cls, state: ModelState | nn.Module | str) -> ModelState:
        """A bare module is a model, a text is the uid of a run."""
        if isinstance(state, ModelState):
            return state
        if isinstance(state, nn.Module):
            return cls(model=state)
        if isinstance(state, str):
            return cls(run=state)
        raise ConfigurationError(
            f"model_state is a ModelState, a module or a run's uid, not {type(state).__name__}"
        )

    def seen_layers(self) -> tuple[LayerInfo, ...]:
        """The layers with their shapes, from one forward pass when they were not given."""
        if self.layers or self.model is None:
            return self.layers
        from esper import grafting

        if self.sample is None:
            return grafting.trace_layers(self.model)
        return grafting.trace_layers(self.model, _call(self.model, self.sample))


class Compiler(Protocol):
    """Makes kernels. ``trusted_key`` is the public half of what it signs with."""

    @property
    def trusted_key(self) -> str: ...

    def build(self, layer: LayerInfo, blueprint: str, config: dict[str, Any]) -> KernelBundle: ...


class Store(Protocol):
    """Stores kernels; ``esper.compilation.KernelStore`` is one."""

    def put(self, bundle: KernelBundle) -> str: ...

    def get(self, digest: str) -> dict[str, bytes]: ...

    def has(self, digest: str) -> bool: ...


class Dispatcher(Protocol):
    """Grafts a kernel into a model; after an error the model is as before."""

    def graft(
        self, state: ModelState, layer: LayerInfo, spec: KernelSpec, adaptation: str
    ) -> Receipt: ...


class LocalCompiler:
    """Builds in this process, and signs with a key of this process."""

    def __init__(self) -> None:
        self._private_key = generate_private_key()
        self.trusted_key = public_key(self._private_key)

    def build(self, layer: LayerInfo, blueprint: str, config: dict[str, Any]) -> KernelBundle:
        from esper.compilation.build import build_kernel

        return build_kernel(layer, blueprint, config, private_key=self._private_key)


class MemoryStore:
    """Kernels of this process only."""

    def __init__(self) -> None:
        self._kernels: dict[str, dict[str, bytes]] = {}

    def put(self, bundle: KernelBundle) -> str:
        self._kernels[bundle.digest] = dict(bundle.files)
        return bundle.digest

    def get(self, digest: str) -> dict[str, bytes]:
        if digest not in self._kernels:
            raise KernelError(f"there is no kernel {digest}", digest=digest)
        return self._kernels[digest]

    def has(self, digest: str) -> bool:
        return digest in self._kernels


class LocalDispatcher:
    """Grafts into a model of this process, between two of its steps."""

    def graft(
        self, state: ModelState, layer: LayerInfo, spec: KernelSpec, adaptation: str
    ) -> Receipt:
        if state.model is None:
            raise ConfigurationError("there is no model in this model_state")
        from esper import grafting

        return grafting.apply_graft(
            state.model,
            layer,
            get_blueprint(spec.blueprint),
            config=spec.config,
            surroundings=grafting.Surroundings(
                optimizers=() if state.optimizer is None else (state.optimizer,),
                schedulers=() if state.scheduler is None else (state.scheduler,),
                scaler=state.scaler,
            ),
            graft=instantiate(spec, layer),
            seed=spec.seed,
            adaptation=adaptation,
            step=state.step,
        )


@dataclass(frozen=True, slots=True)
class PreparedKernel:
    """A kernel that was verified; ``cached`` says that nothing had to be built."""

    digest: str
    spec: KernelSpec
    report: KernelReport
    cached: bool
    ms: float


class ExecutionSystemIntegrator:
    """Gets kernels, from the cache where there is one, and grafts them."""

    def __init__(
        self,
        *,
        compiler: Compiler | None = None,
        dispatcher: Dispatcher | None = None,
        store: Store | None = None,
    ) -> None:
        self._compiler: Compiler = compiler or LocalCompiler()
        self._dispatcher: Dispatcher = dispatcher or LocalDispatcher()
        self._store: Store = store if store is not None else MemoryStore()
        self._digests: dict[str, str] = {}  # kernel key's hash -> digest
        self.hits = 0
        self.misses = 0

    async def prepare(self, layer: LayerInfo, decision: Decision) -> PreparedKernel:
        """Look up or build, and verify as if it came from an unknown sender.

        Raises:
            KernelError: it could not be built, or is not what it claims to be.
        """
        started = time.perf_counter()
        index = kernel_key(layer, decision.blueprint, decision.config).hash
        digest = self._digests.get(index, "")
        cached = bool(digest) and self._store.has(digest)
        if cached:
            self.hits += 1
        else:
            self.misses += 1
            digest = self._store.put(await self._build(layer, decision))
            self._digests[index] = digest
        _, spec, report = open_kernel(self._store.get(digest), digest, self._compiler.trusted_key)
        elapsed_ms = (time.perf_counter() - started) * 1e3
        return PreparedKernel(digest, spec, report, cached, elapsed_ms)

    def dispatch(
        self, state: ModelState, layer: LayerInfo, kernel: PreparedKernel, adaptation: str
    ) -> Receipt:
        """Graft now, in the caller's thread: the model must not be running meanwhile."""
        return self._dispatcher.graft(state, layer, kernel.spec, adaptation)

    def cache_stats(self) -> dict[str, float]:
        asked = self.hits + self.misses
        return {
            "kernels": len(self._digests),
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": self.hits / asked if asked else 0.0,
        }

    async def _build(self, layer: LayerInfo, decision: Decision) -> KernelBundle:
        # Beside the caller's event loop: a build takes tens of milliseconds.
        return await asyncio.to_thread(
            self._compiler.build, layer, decision.blueprint, decision.config
        )


def _call(model: nn.Module, sample: Any) -> Callable[[], Any]:
    if isinstance(sample, dict):
        return lambda: model(**sample)
    if isinstance(sample, tuple):
        return lambda: model(*sample)
    return lambda: model(sample)
