"""Record the decisions of this folder anew: ``python -m tests.esper.recorded.record``.

To be done when the heuristics, the gates or the catalogue are meant to decide otherwise than
before. Look at the difference first: it is what every user's runs will do.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from esper import blueprints
from esper.contracts import (
    SIGNAL_INDEX,
    SIGNALS,
    Decision,
    Finding,
    HealthFrame,
    LayerHistory,
    LayerInfo,
    RunMode,
    RunSnapshot,
    SafetyPolicy,
    Severity,
    Signal,
    ViolationRule,
    codec,
    wire,
)
from esper.contracts.protocol import Decline, Proposal
from esper.pipeline import decide
from esper.policy import HeuristicPolicy
from esper.replay import decision_rng, message_of, pack_snapshot

FOLDER = Path(__file__).parent
LAYERS = tuple(
    LayerInfo(
        name=name,
        kind="Linear",
        in_shape=(32, 16),
        out_shape=(32, 16),
        dtype="float32",
        parameters=272,
        graftable=True,
        features_in=16,
        features_out=16,
        order=order,
    )
    for order, name in enumerate(("fc1", "fc2", "head"))
)

LACKS_CAPACITY = Finding(
    rule=ViolationRule.DIAGNOSIS,
    layer="fc2",
    severity=Severity.CAUTION,
    observed="the loss is flat and fc2 uses up its capacity",
    limit="a loss that falls",
    remedy="Widen fc2.",
    slug="capacity",
    since_step=600,
)


def flat_loss() -> RunSnapshot:
    """The loss has been flat for long, and fc2 uses up its capacity."""
    noise = np.random.default_rng(7)
    steps = np.arange(300, 1000, 5, dtype=np.int64)
    loss = np.round(0.9 + 0.01 * noise.standard_normal(len(steps)), 5)
    early = np.arange(0, 300, 5, dtype=np.int64)
    early_loss = np.round(2.3 * 0.99**early + 0.9, 5)
    return RunSnapshot(
        run="run_recorded",
        epoch=1,
        mode=RunMode.AUTOMATIC,
        step=1000,
        layers=LAYERS,
        frames=tuple(frame(step) for step in range(900, 1001, 10)),
        loss_steps=np.concatenate([early, steps]),
        loss=np.concatenate([early_loss, loss]),
        model_parameters=100_000,
        age_seconds=1.5,
        findings=(LACKS_CAPACITY,),
    )


def frame(step: int) -> HealthFrame:
    values = np.full((len(LAYERS), len(SIGNALS)), 0.2, dtype=np.float32)
    values[:, SIGNAL_INDEX[Signal.GRAD_NORM]] = (0.1, 0.9, 0.1)
    values[:, SIGNAL_INDEX[Signal.WEIGHT_NORM]] = 3.0
    values[:, SIGNAL_INDEX[Signal.UPDATE_RATIO]] = 1e-3
    values[:, SIGNAL_INDEX[Signal.STABLE_RANK]] = (0.1, 0.5, 0.1)
    values[:, SIGNAL_INDEX[Signal.DEAD_FRACTION]] = 0.0
    values[:, SIGNAL_INDEX[Signal.HEALTH]] = 0.9
    names = tuple(layer.name for layer in LAYERS)
    return HealthFrame(step, 1_795_000_000.0 + step, names, values)


def cases() -> Iterator[tuple[str, RunSnapshot, SafetyPolicy]]:
    """Name, snapshot and limits of each recorded decision."""
    run = flat_loss()
    yield "a-flat-loss-is-answered", run, SafetyPolicy()
    history = {"fc2": LayerHistory(last_adaptation_step=900)}
    yield "a-layer-that-was-just-grafted-rests", replace(run, history=history), SafetyPolicy()
    grafted = {"fc2": LayerHistory(grafts=("proj_lora_64",), last_adaptation_step=200)}
    yield "a-grafted-layer-gets-something-else", replace(run, history=grafted), SafetyPolicy()


def main() -> None:
    policy = HeuristicPolicy()
    for name, snapshot, limits in cases():
        answer = decide(
            snapshot, policy, blueprints.list_blueprints(), limits, decision_rng(snapshot)
        )
        message: Proposal | Decline
        if isinstance(answer, Decision):
            message = Proposal.of(answer, epoch=snapshot.epoch)
        else:
            message = Decline.of(answer, epoch=snapshot.epoch, policy=policy.name)
        packed = base64.b64encode(pack_snapshot(message_of(snapshot, limits))).decode()
        recorded = {
            "kind": type(message).__name__,
            "message": wire.to_wire(message),
            "snapshot": packed,
        }
        (FOLDER / f"{name}.json").write_bytes(codec.encode(recorded) + b"\n")


if __name__ == "__main__":
    main()
