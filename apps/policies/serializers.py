from __future__ import annotations

from rest_framework import serializers

from apps.policies.models import AdaptationSwitch, PolicyVersion
from apps.rest.fields import Flag, Members, PersonsInput, Text


class PolicyOutput(serializers.ModelSerializer[PolicyVersion]):
    values = Members()
    author = serializers.CharField(source="author.username", default=None, allow_null=True)

    class Meta:
        model = PolicyVersion
        fields = ("version", "values", "reason", "author", "created_at")


class PolicyInput(PersonsInput):
    """``changes``: thresholds by name, with their new values."""

    changes = Members()
    reason = Text(allow_blank=True, default="")


class SwitchOutput(serializers.ModelSerializer[AdaptationSwitch]):
    class Meta:
        model = AdaptationSwitch
        fields = ("on", "changed_by", "reason", "changed_at")


class SwitchInput(PersonsInput):
    on = Flag()
    reason = Text(allow_blank=True, default="")
