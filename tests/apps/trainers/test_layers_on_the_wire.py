"""A layer's description survives the way through the server whole."""

from __future__ import annotations

from dataclasses import fields

from apps.trainers.serializers import _LAYER_MEMBERS
from esper.contracts import LayerInfo


def test_the_server_keeps_every_field_that_a_trainer_sends() -> None:
    assert set(_LAYER_MEMBERS) == {field.name for field in fields(LayerInfo)}
