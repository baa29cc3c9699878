"""A run's snapshot as strict JSON and back, so that any decision can be replayed.

The shape is that of ``GET runs/{uid}/snapshot`` in ``docs/protocol.md``.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from esper.contracts import (
    Experience,
    HealthFrame,
    LayerHistory,
    LayerInfo,
    RunMode,
    RunSnapshot,
    pack_values,
    unpack_values,
)
from esper.contracts.codec import number_from_wire, number_to_wire
from esper.exceptions import CodecError


def snapshot_to_wire(snapshot: RunSnapshot) -> dict[str, Any]:
    """Strict JSON; frames are packed float32 rows in the order of ``layers``.

    Raises:
        CodecError: a frame's layers are not the snapshot's.
    """
    return {
        "run": snapshot.run,
        "epoch": snapshot.epoch,
        "mode": str(snapshot.mode),
        "step": snapshot.step,
        "layers": [layer.to_wire() for layer in snapshot.layers],
        "frames": [_frame_to_wire(frame, snapshot) for frame in snapshot.frames],
        "metrics": [
            {"step": int(step), "values": {"loss": number_to_wire(float(loss))}}
            for step, loss in zip(snapshot.loss_steps, snapshot.loss, strict=True)
        ],
        "model_parameters": snapshot.model_parameters,
        "added_parameters": snapshot.added_parameters,
        "adaptations_today": snapshot.adaptations_today,
        "in_flight": snapshot.in_flight,
        "last_adaptation_step": snapshot.last_adaptation_step,
        "frozen": snapshot.frozen,
        "history": {
            name: {**asdict(history), "grafts": list(history.grafts)}
            for name, history in snapshot.history.items()
        },
        "experience": {
            slug: {**asdict(cases), "mean_reward": number_to_wire(cases.mean_reward)}
            for slug, cases in snapshot.experience.items()
        },
        "disabled_blueprints": sorted(snapshot.disabled_blueprints),
        "age_seconds": number_to_wire(snapshot.age_seconds),
    }


def snapshot_from_wire(data: dict[str, Any]) -> RunSnapshot:
    """Inverse of :func:`snapshot_to_wire`; keys that it does not know are left alone.

    Raises:
        CodecError: something is missing or malformed.
    """
    try:
        layers = tuple(LayerInfo.from_wire(layer) for layer in data["layers"])
        names = tuple(layer.name for layer in layers)
        losses = [item for item in data["metrics"] if "loss" in item["values"]]
        return RunSnapshot(
            run=str(data["run"]),
            epoch=int(data["epoch"]),
            mode=RunMode(data["mode"]),
            step=int(data["step"]),
            layers=layers,
            frames=tuple(_frame_from_wire(frame, names) for frame in data["frames"]),
            loss_steps=np.array([item["step"] for item in losses], dtype=np.int64),
            loss=np.array(
                [number_from_wire(item["values"]["loss"]) for item in losses], dtype=np.float64
            ),
            model_parameters=int(data["model_parameters"]),
            added_parameters=int(data["added_parameters"]),
            adaptations_today=int(data["adaptations_today"]),
            in_flight=int(data["in_flight"]),
            last_adaptation_step=int(data["last_adaptation_step"]),
            frozen=str(data["frozen"]),
            history={name: _history(value) for name, value in data["history"].items()},
            experience={slug: _experience(value) for slug, value in data["experience"].items()},
            disabled_blueprints=frozenset(data["disabled_blueprints"]),
            age_seconds=number_from_wire(data.get("age_seconds", "nan")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CodecError(f"not a snapshot: {error}") from error


def _frame_to_wire(frame: HealthFrame, snapshot: RunSnapshot) -> dict[str, Any]:
    if frame.layers != tuple(layer.name for layer in snapshot.layers):
        raise CodecError(f"the frame of step {frame.step} has other layers than its run")
    return {
        "step": frame.step,
        "wall_time": frame.wall_time,
        "values": pack_values(frame.values),
        "metrics": {name: number_to_wire(value) for name, value in frame.metrics.items()},
    }


def _frame_from_wire(data: dict[str, Any], names: tuple[str, ...]) -> HealthFrame:
    return HealthFrame(
        step=int(data["step"]),
        wall_time=float(data["wall_time"]),
        layers=names,
        values=unpack_values(data["values"], len(names)),
        metrics={name: number_from_wire(value) for name, value in data.get("metrics", {}).items()},
    )


def _history(data: dict[str, Any]) -> LayerHistory:
    return LayerHistory(**{**data, "grafts": tuple(data["grafts"])})


def _experience(data: dict[str, Any]) -> Experience:
    return Experience(**{**data, "mean_reward": number_from_wire(data["mean_reward"])})
