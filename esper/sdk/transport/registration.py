"""What a trainer sends to register its run, and what the server answers."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from esper.contracts import LayerInfo, RunMode, codec, protocol, wire
from esper.sdk.transport.commands import Trust

_BODY_ROOM_BYTES = 900_000  # of the 1 MiB that a body may have


@dataclass(frozen=True, slots=True)
class RunDescription:
    """The run as it registers, after its first step.

    ``applied`` and ``remedies`` say what the model holds, for ``hello``: from a checkpoint, or,
    when the run has to register again, all that was applied since. They are called in the transport
    thread.
    ``capabilities`` is the capability of each device that holds a layer.
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
    applied: Callable[[], tuple[protocol.Applied, ...]] = tuple
    remedies: Callable[[], tuple[protocol.HeldRemedy, ...]] = tuple

    def message(self, continues: protocol.Continued | None = None) -> protocol.Registration:
        """What is posted. Thousands of layers go without their links, which are not essential."""
        message = protocol.Registration(
            name=self.name,
            mode=self.mode,
            host=platform.node() or "unknown",
            capability=self.capability,
            capabilities=self.capabilities,
            target_steps=self.target_steps,
            versions=self.versions,
            model_parameters=self.model_parameters,
            layers=self.layers,
            continues=continues,
        )
        if len(codec.encode(wire.to_wire(message))) <= _BODY_ROOM_BYTES:
            return message
        unlinked = tuple(replace(layer, feeds=()) for layer in self.layers)
        return msgspec.structs.replace(message, layers=unlinked)


class Registration(protocol.Registered, frozen=True, kw_only=True):
    """The server's answer, and what follows from it.

    Attributes:
        clock_offset: the server's clock minus ours, in seconds.
    """

    clock_offset: float = 0.0

    @property
    def run(self) -> str:
        return self.uid

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
        """Raises ``MessageError`` when the answer is not a registration."""
        answer = wire.from_wire(cls, data)
        return msgspec.structs.replace(answer, clock_offset=answer.server_time - time.time())
