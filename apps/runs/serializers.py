from __future__ import annotations

from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from apps.accounts.models import User
from apps.accounts.policy import Act, may
from apps.accounts.serializers import PermissionOutput
from apps.rest.fields import (
    Members,
)
from apps.runs.models import Command, Run


@extend_schema_field(
    {"oneOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}, {"type": "null"}]}
)
class LastLoss(serializers.Field[Any, Any, Any, Run]):
    """The newest loss; "nan", "inf" or "-inf" once it diverged, null before the first one."""

    def to_representation(self, run: Run) -> float | str | None:
        return run.last_loss_status or run.last_loss


class RunOutput(serializers.ModelSerializer[Run]):
    owner = serializers.CharField(source="owner.username")
    project = serializers.CharField(source="project.uid")
    last_loss = LastLoss(source="*", read_only=True)
    number = serializers.IntegerField()

    class Meta:
        model = Run
        fields: tuple[str, ...] = (
            "uid",
            "number",
            "name",
            "owner",
            "project",
            "mode",
            "state",
            "epoch",
            "host",
            "capability",
            "capabilities",
            "step",
            "target_steps",
            "last_loss",
            "model_parameters",
            "adaptation_paused_by",
            "adaptation_paused_at",
            "quarantined_reason",
            "created_at",
            "last_seen_at",
            "ended_at",
            "end_reason",
        )


class RunDetailOutput(RunOutput):
    layers = serializers.ListField(child=Members())
    versions = Members()
    permissions = serializers.SerializerMethodField()

    class Meta(RunOutput.Meta):
        fields: tuple[str, ...] = (
            *RunOutput.Meta.fields,
            "layers",
            "versions",
            "telemetry_seq",
            "dropped_items",
            "command_seq",
            "permissions",
        )

    @extend_schema_field(serializers.DictField(child=PermissionOutput()))
    def get_permissions(self, run: Run) -> Any:
        return PermissionOutput.of(self.context["permissions"])


class CommandOutput(serializers.ModelSerializer[Command]):
    """A command to the trainer with its answer, as people read it."""

    adaptation = serializers.CharField(source="adaptation_uid")
    payload = Members()

    class Meta:
        model = Command
        fields = (
            "seq",
            "epoch",
            "kind",
            "adaptation",
            "layer",
            "kernel_digest",
            "payload",
            "issued_at",
            "expires_at",
            "state",
            "code",
            "reason",
            "step",
            "pause_ms",
            "acknowledged_at",
        )


def run_answer(user: User, run: Run) -> dict[str, Any]:
    """A run with what ``user`` may do with it."""
    permissions = {str(act): may(user, act, of=run) for act in (Act.PAUSE_ADAPTATION, Act.STOP_RUN)}
    data: dict[str, Any] = RunDetailOutput(run, context={"permissions": permissions}).data
    return data
