from __future__ import annotations

from typing import Any

from rest_framework import serializers

from apps.accounts.serializers import PermissionOutput
from apps.recipes.files import MAX_PARAMETERS
from apps.recipes.models import Launch, Recipe
from apps.rest.fields import BoundedDict, Members, PersonsInput, Text


class RecipeOutput(serializers.ModelSerializer[Recipe]):
    argv = serializers.ListField(child=serializers.CharField())
    parameters = serializers.ListField(child=Members())
    environment = serializers.ListField(child=serializers.CharField())

    class Meta:
        model = Recipe
        fields = (
            "uid",
            "host",
            "slug",
            "digest",
            "name",
            "description",
            "argv",
            "directory",
            "environment",
            "grace_seconds",
            "parameters",
            "resumable",
            "usable",
            "problem",
            "registered_at",
        )

    resumable = serializers.BooleanField()
    usable = serializers.BooleanField()


class LaunchOutput(serializers.ModelSerializer[Launch]):
    recipe = serializers.CharField(source="recipe.uid")
    host = serializers.CharField(source="recipe.host")
    slug = serializers.CharField(source="recipe.slug")
    project = serializers.CharField(source="project.uid")
    parameters = Members()
    requested_by = serializers.CharField(source="requested_by.username")
    last_lines = serializers.ListField(child=serializers.CharField())
    command = serializers.ListField(child=serializers.CharField())

    class Meta:
        model = Launch
        fields: tuple[str, ...] = (
            "uid",
            "number",
            "recipe",
            "host",
            "slug",
            "project",
            "digest",
            "parameters",
            "run_uid",
            "state",
            "attempt",
            "reason",
            "command",
            "requested_by",
            "stopped_by",
            "exit_code",
            "exit_signal",
            "last_lines",
            "log_end",
            "created_at",
            "requested_at",
            "started_at",
            "seen_at",
            "ended_at",
        )

    number = serializers.IntegerField()


class LaunchDetailOutput(LaunchOutput):
    permissions = serializers.SerializerMethodField()

    class Meta(LaunchOutput.Meta):
        fields: tuple[str, ...] = (*LaunchOutput.Meta.fields, "permissions")

    def get_permissions(self, launch: Launch) -> dict[str, Any]:
        return PermissionOutput.of(self.context["permissions"])


class LaunchInput(PersonsInput):
    """``digest`` is of the recipe that the person was shown; the host refuses any other."""

    host = Text(max_length=120)
    project = Text(max_length=40, required=False, default="", allow_blank=True)
    recipe = Text(max_length=80)
    digest = Text(max_length=64)
    parameters = BoundedDict(child=serializers.JSONField(), max_length=MAX_PARAMETERS, default=dict)


class LogOutput(serializers.Serializer[Any]):
    """Whole lines from byte ``start`` to ``end`` of the host's log; ``more`` is there already."""

    start = serializers.IntegerField()
    end = serializers.IntegerField()
    more = serializers.BooleanField()
    text = serializers.CharField()
