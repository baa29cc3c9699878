from __future__ import annotations

from rest_framework import serializers

from apps.policies.models import AdaptationSwitch, Freeze, PolicyVersion, ProjectSwitch, Scope
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


class FreezeOutput(serializers.ModelSerializer[Freeze]):
    """``project`` null: all runs. ``ended_at``: it was ended before its time."""

    project = serializers.CharField(source="project.uid", default=None, allow_null=True)
    set_by = serializers.CharField(source="set_by.username")
    ended_by = serializers.CharField(source="ended_by.username", default=None, allow_null=True)

    class Meta:
        model = Freeze
        fields = (
            "uid", "project", "starts_at", "ends_at", "reason", "set_by", "created_at",
            "ended_by", "ended_at", "end_reason",
        )  # fmt: skip


class FreezeInput(PersonsInput):
    """Times with their zone. Without ``starts_at`` it begins now; without ``project`` for all."""

    starts_at = serializers.DateTimeField(required=False, allow_null=True, default=None)
    ends_at = serializers.DateTimeField()
    project = Text(max_length=40, required=False, default="", allow_blank=True)
    reason = Text(max_length=2000)
