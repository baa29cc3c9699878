"""The server keeps a layer's whole description."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from apps.accounts.models import User
from apps.runs.models import Run
from esper.contracts import LayerInfo, Role
from tests.apps.callers import register

pytestmark = pytest.mark.django_db

OTHER: dict[str, Any] = {
    "name": "conv",
    "kind": "Conv2d",
    "in_shape": (8, 3, 32, 32),
    "out_shape": (8, 16, 16, 16),
    "dtype": "bfloat16",
    "parameters": 448,
    "graftable": False,
    "reason": "a container",
    "features_in": 3,
    "features_out": 16,
    "channel_axis": 1,
    "device": "cuda:0",
    "order": 7,
    "calls": 2,
    "trainable": False,
    "feeds": ("fc", "head"),
    "kernel_size": (3, 3),
    "stride": (2, 2),
    "padding": (1, 1),
    "dilation": (1, 2),
    "groups": 4,
    "head_width": 8,
    "cached_channels": (0, 16),
    "looks_ahead": True,
    "sequence_axis": -1,
    "activation": "relu",
    "compiled": True,
    "recomputed": 2,
    "since": "stem",
}


def test_the_server_keeps_every_field_that_a_trainer_sends(people: dict[Role, User]) -> None:
    assert set(OTHER) == {field.name for field in fields(LayerInfo)}
    layer = LayerInfo(**OTHER)
    trainer = register(people[Role.RESEARCHER], layers=[layer.to_wire()])
    assert Run.objects.get(uid=trainer.run).layer_info("conv") == layer
