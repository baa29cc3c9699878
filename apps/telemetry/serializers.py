from __future__ import annotations

from typing import Any

from rest_framework import serializers

from esper.contracts import Signal


class NonFiniteOutput(serializers.Serializer[Any]):
    step = serializers.IntegerField()
    value = serializers.ChoiceField(choices=["nan", "inf", "-inf"])


class SeriesOutput(serializers.Serializer[Any]):
    """Columns of equal length: one entry for each bucket, null where no value is finite."""

    name = serializers.CharField()
    width = serializers.IntegerField(help_text="Steps of a bucket; ask for it again to follow.")
    step = serializers.ListField(child=serializers.IntegerField())
    min = serializers.ListField(child=serializers.FloatField(allow_null=True))
    mean = serializers.ListField(child=serializers.FloatField(allow_null=True))
    max = serializers.ListField(child=serializers.FloatField(allow_null=True))
    non_finite = NonFiniteOutput(many=True)


class HeatmapOutput(serializers.Serializer[Any]):
    """``values[layer][column]``; null: not measured."""

    signal = serializers.ChoiceField(choices=list(Signal))
    layers = serializers.ListField(child=serializers.CharField())
    step = serializers.ListField(child=serializers.IntegerField())
    values = serializers.ListField(
        child=serializers.ListField(child=serializers.FloatField(allow_null=True))
    )
