"""What was grafted, as it is written into a state: JSON values, and those values as one tensor.

A plain ``model.state_dict()`` holds one such tensor for each layer with grafts, so that a graft can
be built again from the state alone. It is a float tensor because scripts average states and cast
them to half precision: the bytes 0 to 255 are exact in every floating-point type.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.blueprints import Graft
from esper.contracts import Certificate, LayerInfo
from esper.exceptions import ConfigurationError

# Torch and transformers print the keys that a model without these grafts does not have. This one
# says what to do with them.
MANIFEST_KEY = "load_with_esper_load_state_dict"


@dataclass(frozen=True, slots=True)
class GraftRecord:
    """All that is needed to build the same graft again."""

    adaptation: str
    layer: LayerInfo
    blueprint: str
    version: str
    config: dict[str, Any]
    seed: int
    step: int
    certificate: Certificate

    def entry(self, graft: Graft) -> dict[str, Any]:
        """The record and the graft's present state of its schedule, as JSON values."""
        return {
            "adaptation": self.adaptation,
            "layer": self.layer.to_wire(),
            "blueprint": self.blueprint,
            "version": self.version,
            "config": self.config,
            "seed": self.seed,
            "step": self.step,
            "alpha": None if graft.alpha is None else float(graft.alpha),
            "certificate": self.certificate.to_wire(),
        }

    @classmethod
    def of_entry(cls, entry: dict[str, Any]) -> GraftRecord:
        """Raises ``ConfigurationError`` where it is no such entry."""
        try:
            return cls(
                adaptation=str(entry["adaptation"]),
                layer=LayerInfo.from_wire(entry["layer"]),
                blueprint=str(entry["blueprint"]),
                version=str(entry["version"]),
                config=dict(entry["config"]),
                seed=int(entry["seed"]),
                step=int(entry["step"]),
                certificate=Certificate.from_wire(entry["certificate"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"not an entry of a structure manifest: {error}") from error


def pack(entries: list[dict[str, Any]]) -> Tensor:
    """Entries as a float32 tensor [bytes], the same for as long as the grafts stay.

    A script may average the states of the model and of its copy tensor by tensor, so the tensors
    must have one length: the state of a graft's schedule, which has a tensor of its own, is left
    out. So is the measured time, which differs from rank to rank: of a state that all ranks hold, a
    distributed checkpoint writes one rank's, and each rank must be able to read it.
    """
    fixed = [_fixed(entry) for entry in entries]
    text = json.dumps(fixed).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).float()


def _fixed(entry: dict[str, Any]) -> dict[str, Any]:
    certificate = {**entry["certificate"], "latency_ms": "nan"}
    return {**{name: v for name, v in entry.items() if name != "alpha"}, "certificate": certificate}


def unpack(packed: Any) -> list[dict[str, Any]]:
    """Inverse of :func:`pack`.

    Raises:
        ConfigurationError: it was changed, for example by an average of two different states.
    """
    try:
        text = bytes(packed.detach().cpu().float().round().to(torch.uint8).tolist())
        entries = json.loads(text)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigurationError(f"the state's {MANIFEST_KEY} cannot be read: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigurationError(f"the state's {MANIFEST_KEY} is not a list of grafts")
    return entries
