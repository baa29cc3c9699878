"""What a trainer sends to register its run, and what the server answers."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from esper.contracts import LayerInfo, RunMode, SafetyPolicy, codec
from esper.exceptions import CodecError
from esper.sdk.transport.commands import Trust

_BODY_ROOM_BYTES = 900_000  # of the 1 MiB that a body may have


@dataclass(frozen=True, slots=True)
class RunDescription:
    """The run as it registers, after its first step.

    ``applied`` is what the model then holds from a checkpoint, for ``hello``; ``capabilities`` is
    the capability of each device that holds a layer.
    """

    name: str
    mode: RunMode
    capability: str
    target_steps: int | None
    versions: dict[str, str]
    model_parameters: int
    layers: tuple[LayerInfo, ...]
    step: int
    capabilities: dict[str, str] = field(default_factory=dict)
    applied: list[dict[str, Any]] = field(default_factory=list)

    def to_wire(self) -> dict[str, Any]:
        body = {
            "name": self.name,
            "mode": str(self.mode),
            "host": platform.node() or "unknown",
            "capability": self.capability,
            "capabilities": self.capabilities,
            "target_steps": self.target_steps,
            "versions": self.versions,
            "model_parameters": self.model_parameters,
            "layers": [layer.to_wire() for layer in self.layers],
        }
        if len(codec.encode(body)) > _BODY_ROOM_BYTES:
            # Thousands of layers: leave out the links between them, which are not essential.
            body["layers"] = [{**layer.to_wire(), "feeds": []} for layer in self.layers]
        return body


@dataclass(frozen=True, slots=True)
class Registration:
    """The server's answer.

    ``clock_offset`` is the server's clock minus ours, in seconds.
    """

    run: str
    number: int
    epoch: int
    token: str
    resumed: bool
    command_key: str
    kernel_key: str
    stream: str
    last_command_seq: int
    policy: SafetyPolicy
    clock_offset: float

    @property
    def trust(self) -> Trust:
        return Trust(
            run=self.run,
            epoch=self.epoch,
            command_key=self.command_key,
            kernel_key=self.kernel_key,
        )

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> Registration:
        """Raises ``CodecError`` when the answer is not a registration."""
        try:
            return cls(
                run=str(data["uid"]),
                number=int(data.get("number") or 0),
                epoch=int(data["epoch"]),
                token=str(data["token"]),
                resumed=bool(data.get("resumed")),
                command_key=str(data["command_key"]),
                kernel_key=str(data["kernel_key"]),
                stream=str(data.get("stream") or ""),
                last_command_seq=int(data.get("last_command_seq") or 0),
                policy=SafetyPolicy.from_wire(data["policy"]),
                clock_offset=_seconds(data["server_time"]) - time.time(),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CodecError(f"not a registration: {error!r}") from error


def _seconds(value: Any) -> float:
    if isinstance(value, str):
        return datetime.fromisoformat(value).timestamp()
    return codec.number_from_wire(value)
