"""Sessions that are attached to the test's control plane, and commands for them."""

from __future__ import annotations

from typing import Any

import esper
from esper.compilation import build_kernel
from esper.contracts import (
    CommandKind,
    LayerInfo,
)
from tests.esper.sdk.tiny_training import Training
from tests.esper.sdk.transport.control_plane import ControlPlane, wait_for


def attached(training: Training, plane: ControlPlane, **options: Any) -> esper.Session:
    given = {"mode": "automatic", "run": "tiny", **options}
    return esper.attach(
        training.model,
        training.optimizer,
        scheduler=training.scheduler,
        server=plane.url,
        token="esp_attach",
        **given,
    )


def listening(training: Training, plane: ControlPlane, **options: Any) -> esper.Session:
    """Attached, registered, and on the command stream."""
    session = attached(training, plane, **options)
    training.run(1, session)
    wait_for(lambda: plane.listeners, "the trainer listens")
    return session


def kernel_for(session: esper.Session, plane: ControlPlane, layer: str = "3") -> str:
    return plane.add_kernel(
        build_kernel(layer_of(session, layer), "proj_lora_64", private_key=plane.kernel_key)
    )


def layer_of(session: esper.Session, name: str) -> LayerInfo:
    return next(layer for layer in session.layers if layer.name == name)


def graft_command(plane: ControlPlane, seq: int, kernel: str, **fields: Any) -> Any:
    given = {"adaptation": f"a{seq}", "layer": "3", "kernel_digest": kernel, **fields}
    return plane.command(CommandKind.GRAFT, seq, **given)


def final_ack(plane: ControlPlane, seq: int) -> dict[str, Any]:
    acks = [ack for ack in plane.acks_of(seq) if ack["state"] != "accepted"]
    assert len(acks) == 1
    return acks[0]


def ended(plane: ControlPlane, seq: int) -> bool:
    return any(ack["state"] != "accepted" for ack in plane.acks_of(seq))
