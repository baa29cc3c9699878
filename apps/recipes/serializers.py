from __future__ import annotations

from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from apps.accounts.serializers import PermissionOutput
from apps.recipes.files import MAX_PARAMETERS
from apps.recipes.models import Launch, Recipe, StoredState
from apps.recipes.selectors import Branch
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
            "branchable",
            "usable",
            "problem",
            "registered_at",
        )

    resumable = serializers.BooleanField()
    branchable = serializers.BooleanField()
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
    branch_of = serializers.CharField(source="branch_of.run_uid", allow_null=True, default=None)

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
            "branch_of",
            "branch_state",
            "branch_step",
            "branch_digest",
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


class BranchInput(PersonsInput):
    """A new run of the same recipe. ``parameters`` are those that differ from this run's."""

    state = Text(max_length=200, required=False, default="", allow_blank=True)
    parameters = BoundedDict(child=serializers.JSONField(), max_length=MAX_PARAMETERS, default=dict)
    reason = Text(max_length=2000, required=False, default="", allow_blank=True)


class StoredStateOutput(serializers.ModelSerializer[StoredState]):
    class Meta:
        model = StoredState
        fields = ("name", "step", "size_bytes", "written_at")


class BranchOutput(serializers.Serializer[Branch]):
    """One launch of the tree. ``changed``: name of a parameter → the parent's value, its own."""

    launch = serializers.CharField(source="launch.uid")
    launch_state = serializers.CharField(source="launch.state")
    run = serializers.CharField(source="launch.run_uid")
    branch_of = serializers.SerializerMethodField()
    branch_step = serializers.IntegerField(source="launch.branch_step", allow_null=True)
    branch_state = serializers.CharField(source="launch.branch_state")
    depth = serializers.IntegerField()
    changed = Members()
    name = serializers.SerializerMethodField()
    state = serializers.SerializerMethodField()
    step = serializers.SerializerMethodField()
    last_loss = serializers.SerializerMethodField()

    def get_branch_of(self, branch: Branch) -> str | None:
        parent = branch.launch.branch_of
        return None if parent is None else parent.run_uid

    def get_name(self, branch: Branch) -> str | None:
        return branch.run.name if branch.run else None

    def get_state(self, branch: Branch) -> str | None:
        return str(branch.run.state) if branch.run else None

    def get_step(self, branch: Branch) -> int | None:
        return branch.run.step if branch.run else None

    @extend_schema_field(
        {"oneOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}, {"type": "null"}]}
    )
    def get_last_loss(self, branch: Branch) -> float | str | None:
        return branch.run.last_loss_status or branch.run.last_loss if branch.run else None


class BranchesOutput(serializers.Serializer[Any]):
    """``states``: what a branch may begin from. ``why_not``: empty, or why none can be started."""

    why_not = serializers.CharField()
    states = StoredStateOutput(many=True)
    tree = BranchOutput(many=True)


class LogOutput(serializers.Serializer[Any]):
    """Whole lines from byte ``start`` to ``end`` of the host's log; ``more`` is there already."""

    start = serializers.IntegerField()
    end = serializers.IntegerField()
    more = serializers.BooleanField()
    text = serializers.CharField()
