from __future__ import annotations

from rest_framework import serializers

from apps.policies.models import AdaptationSwitch, PolicyVersion, ProjectSwitch, Scope
from apps.rest.fields import Flag, Members, PersonsInput, Text


class PolicyOutput(serializers.ModelSerializer[PolicyVersion]):
    values = Members()
    own = Members()
    sources = Members()
    backtest = Members()
    laxer = serializers.ListField(child=serializers.CharField())
    author = serializers.CharField(source="author.username", default=None, allow_null=True)
    decided_by = serializers.CharField(source="decided_by.username", default=None, allow_null=True)

    class Meta:
        model = PolicyVersion
        fields = (
            "version", "scope", "target", "state", "values", "own", "sources", "laxer",
            "backtest", "reason", "author", "created_at", "decided_by", "decided_at",
        )  # fmt: skip


class PolicyInput(PersonsInput):
    """``changes``: thresholds by name, with their new values. ``run``: one of the scope."""

    changes = Members()
    reason = Text(allow_blank=True, default="")
    scope = serializers.ChoiceField(choices=Scope.choices, default=Scope.GLOBAL)
    run = Text(allow_blank=True, default="")


class DraftInput(PersonsInput):
    reason = Text(allow_blank=True, default="")


class SwitchOutput(serializers.ModelSerializer[AdaptationSwitch]):
    class Meta:
        model = AdaptationSwitch
        fields = ("on", "changed_by", "reason", "changed_at")


class ProjectSwitchOutput(serializers.ModelSerializer[ProjectSwitch]):
    """``changed_at`` null: it was never used."""

    project = serializers.CharField(source="project.uid")
    changed_at = serializers.DateTimeField(allow_null=True)

    class Meta:
        model = ProjectSwitch
        fields = ("project", "on", "changed_by", "reason", "changed_at")


class SwitchInput(PersonsInput):
    on = Flag()
    reason = Text(allow_blank=True, default="")
