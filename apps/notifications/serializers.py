from __future__ import annotations

from typing import Any

from rest_framework import serializers

from apps.rest.fields import Members


class EventOutput(serializers.Serializer[Any]):
    """One event, exactly as the websocket sends it."""

    topic = serializers.CharField()
    seq = serializers.IntegerField()
    ts = serializers.CharField()
    type = serializers.CharField()
    data = Members()  # type: ignore[assignment]  # a field; the metaclass takes it away


class EventsOutput(serializers.Serializer[Any]):
    """``seq`` is the topic's newest number: ask again with ``after`` until it is reached."""

    results = EventOutput(many=True)
    seq = serializers.IntegerField()
