from __future__ import annotations

from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from apps.accounts.serializers import PermissionOutput
from apps.api.fields import Members, PersonsInput, Text, WholeNumber
from apps.runs.models import Run
from esper.contracts import MAX_NAME_LENGTH, CommandState, RunMode


@extend_schema_field(
    {"oneOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}, {"type": "null"}]}
)
class LastLoss(serializers.Field[Any, Any, Any, Run]):
    """The newest loss; "nan" and the like once it diverged, null before the first."""

    def to_representation(self, run: Run) -> float | str | None:
        return run.last_loss_status or run.last_loss


class RunOutput(serializers.ModelSerializer[Run]):
    owner = serializers.CharField(source="owner.username")
    last_loss = LastLoss(source="*", read_only=True)
    number = serializers.IntegerField()

    class Meta:
        model = Run
        fields = (
            "uid",
            "number",
            "name",
            "owner",
            "mode",
            "state",
            "epoch",
            "host",
            "capability",
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
        fields = (
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


class CommandOutput(serializers.Serializer[Any]):
    """``esper.contracts.Command`` and the server's signature over it."""

    command = Members()
    signature = serializers.CharField()


class ReasonInput(PersonsInput):
    reason = Text(allow_blank=True, default="")


class LayerField(Members):
    """``esper.contracts.LayerInfo`` on the wire; the view turns it into one."""


class RunInput(serializers.Serializer[Any]):
    name = Text(max_length=MAX_NAME_LENGTH)
    mode = serializers.ChoiceField(choices=list(RunMode))
    host = Text(max_length=120, allow_blank=True)
    capability = Text(max_length=40)
    target_steps = WholeNumber(allow_null=True, default=None)
    versions = serializers.DictField(child=Text(max_length=80, allow_blank=True), default=dict)
    model_parameters = WholeNumber()
    layers = serializers.ListField(child=LayerField())


class RegistrationOutput(serializers.Serializer[Any]):
    uid = serializers.CharField()
    number = serializers.IntegerField()
    epoch = serializers.IntegerField()
    token = serializers.CharField()
    resumed = serializers.BooleanField()
    command_key = serializers.CharField()
    kernel_key = serializers.CharField()
    stream = serializers.CharField()
    last_command_seq = serializers.IntegerField()
    policy = Members()
    server_time = serializers.FloatField()


class AppliedInput(serializers.Serializer[Any]):
    adaptation = Text(max_length=64, allow_blank=True)
    layer = Text(max_length=MAX_NAME_LENGTH)
    blueprint = Text(max_length=60)
    step = WholeNumber(min_value=-1)


class HelloInput(serializers.Serializer[Any]):
    epoch = WholeNumber()
    step = WholeNumber()
    applied = AppliedInput(many=True)


class SettledOutput(serializers.Serializer[Any]):
    adaptation = serializers.CharField()
    state = serializers.CharField()


class HelloOutput(serializers.Serializer[Any]):
    settled = SettledOutput(many=True)


ANSWERS = [state for state in CommandState if state not in {"issued", "expired"}]
