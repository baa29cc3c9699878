"""The cast of the deciding tests: a layer, a run, a catalogue of plain fakes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from esper.contracts import (
    SIGNAL_INDEX,
    SIGNALS,
    AdaptationType,
    BlueprintCategory,
    CostForecast,
    Finding,
    GraftKind,
    HealthFrame,
    LayerInfo,
    Risk,
    RunMode,
    RunSnapshot,
    Severity,
    Signal,
    ViolationRule,
)
from esper.grafting.found_copies import search


def _seed_the_cpu(seed: int) -> torch.Generator:
    """``torch.manual_seed`` without a stack trace for each kind of device that is not there.

    The traces took a sixth of the time of the tests of grafts.
    """
    return torch.default_generator.manual_seed(seed)


if not torch.accelerator.is_available():
    torch.manual_seed = torch.random.manual_seed = _seed_the_cpu


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """An Accelerator keeps its settings for the whole process; the next test has its own."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(autouse=True)
def _fresh_search_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The searches of all sessions of a process share their time; each test has its own."""
    monkeypatch.setattr(search, "search_time", search.SearchTime())


HEALTHY = {
    Signal.GRAD_NORM: 0.5,
    Signal.WEIGHT_NORM: 4.0,
    Signal.UPDATE_RATIO: 1e-3,
    Signal.ACT_MEAN: 0.1,
    Signal.ACT_STD: 1.0,
    Signal.DEAD_FRACTION: 0.0,
    Signal.SATURATION: 0.01,
    Signal.STABLE_RANK: 0.4,
    Signal.GRAD_SNR: 0.3,
}


LACKS_CAPACITY = Finding(
    rule=ViolationRule.DIAGNOSIS,
    layer="",
    severity=Severity.CAUTION,
    observed="the loss is flat and every unit is in use",
    limit="a loss that falls",
    remedy="Widen the model.",
    slug="capacity",
    since_step=800,
)


@dataclass(frozen=True)
class PlainBlueprint:
    """A blueprint that costs ``width`` parameters per size step; fits everything but embeddings."""

    slug: str
    adaptation_type: AdaptationType
    category: BlueprintCategory = BlueprintCategory.EFFICIENCY
    kind: GraftKind = GraftKind.PARALLEL
    risk: Risk = Risk.LOW
    conflicts: frozenset[str] = field(default_factory=frozenset)
    requires: frozenset[str] = field(default_factory=frozenset)
    parts: int = 1
    parameters: int = 16
    memory_mib: float = 0.01
    latency_ms: float = 0.05
    size_count: int = 3

    def refusal(self, layer: LayerInfo) -> str:
        return "An embedding is a table, not a map." if layer.kind == "Embedding" else ""

    def sizes(self, layer: LayerInfo) -> tuple[dict[str, Any], ...]:
        return tuple({"size": i + 1} for i in range(self.size_count))

    def forecast(self, layer: LayerInfo, config: dict[str, Any]) -> CostForecast:
        size = config["size"]
        return CostForecast(
            parameters=self.parameters * size,
            flops=2 * self.parameters * size,
            memory_mib=self.memory_mib * size,
            latency_ms=self.latency_ms,
        )


CATALOG = (
    PlainBlueprint("lora", AdaptationType.ADD_EFFICIENCY),
    PlainBlueprint("gain", AdaptationType.ADD_EFFICIENCY, kind=GraftKind.SCALE, parameters=2),
    PlainBlueprint(
        "ffn",
        AdaptationType.ADD_FFN,
        BlueprintCategory.TRANSFORMER,
        risk=Risk.MEDIUM,
        parameters=64,
        conflicts=frozenset({"ffn_gated"}),
    ),
    PlainBlueprint(
        "ffn_gated",
        AdaptationType.ADD_FFN,
        BlueprintCategory.TRANSFORMER,
        risk=Risk.MEDIUM,
        parameters=96,
    ),
    PlainBlueprint(
        "attention", AdaptationType.ADD_ATTENTION, BlueprintCategory.TRANSFORMER, risk=Risk.MEDIUM
    ),
    PlainBlueprint(
        "watch",
        AdaptationType.ADD_DIAGNOSTIC,
        BlueprintCategory.DIAGNOSTICS,
        kind=GraftKind.OBSERVE,
        risk=Risk.NONE,
        parameters=0,
        size_count=1,
    ),
    PlainBlueprint(
        "clamp",
        AdaptationType.ADD_DIAGNOSTIC,
        BlueprintCategory.DIAGNOSTICS,
        kind=GraftKind.WRAP,
        parameters=0,
        size_count=1,
    ),
)


@pytest.fixture(scope="session")
def plain_blueprint() -> type[PlainBlueprint]:
    return PlainBlueprint


@pytest.fixture(scope="session")
def catalog() -> tuple[PlainBlueprint, ...]:
    return CATALOG


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., LayerInfo]:
    def make(name: str, **changes: Any) -> LayerInfo:
        layer = LayerInfo(
            name=name,
            kind="Linear",
            in_shape=(8, 32),
            out_shape=(8, 32),
            dtype="float32",
            parameters=1056,
            graftable=True,
            features_in=32,
            features_out=32,
        )
        return replace(layer, **changes)

    return make


@pytest.fixture(scope="session")
def make_frames() -> Callable[..., tuple[HealthFrame, ...]]:
    """Frames of a healthy run; ``signals[layer][signal]`` changes single columns."""

    def make(
        names: tuple[str, ...],
        signals: dict[str, dict[Signal, float]] | None = None,
        *,
        count: int = 4,
        last_step: int = 1000,
    ) -> tuple[HealthFrame, ...]:
        values = np.full((len(names), len(SIGNALS)), np.nan, dtype=np.float32)
        for row, name in enumerate(names):
            for signal, value in {**HEALTHY, **(signals or {}).get(name, {})}.items():
                values[row, SIGNAL_INDEX[signal]] = value
        return tuple(
            HealthFrame(last_step - 10 * (count - 1 - i), 1e9 + i, names, values.copy())
            for i in range(count)
        )

    return make


@pytest.fixture(scope="session")
def make_snapshot(
    make_layer: Callable[..., LayerInfo], make_frames: Callable[..., tuple[HealthFrame, ...]]
) -> Callable[..., RunSnapshot]:
    """A run of three layers that lacks capacity: its loss fell from 3.0, and is flat at 1.0."""

    def make(
        *, signals: dict[str, dict[Signal, float]] | None = None, **changes: Any
    ) -> RunSnapshot:
        layers = changes.pop("layers", None) or tuple(make_layer(n) for n in ("in", "mid", "out"))
        steps = np.arange(1, 1001, dtype=np.int64)
        noise = np.random.default_rng(0).normal(0, 0.02, len(steps))
        values: dict[str, Any] = {
            "run": "run-1",
            "epoch": 1,
            "mode": RunMode.AUTOMATIC,
            "step": 1000,
            "layers": layers,
            "frames": make_frames(tuple(layer.name for layer in layers), signals),
            "loss_steps": steps,
            "loss": 1.0 + 2.0 * np.exp(-steps / 60.0) + noise,
            "model_parameters": 3168,
            "age_seconds": 1.0,
            "findings": (LACKS_CAPACITY,),
        }
        return RunSnapshot(**{**values, **changes})

    return make
