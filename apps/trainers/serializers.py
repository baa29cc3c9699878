"""The shapes of what trainers send and of what they are answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from apps.rest.fields import (
    BoundedDict,
    BoundedList,
    Flag,
    Members,
    Text,
    WholeNumber,
    WireNumber,
)
from apps.telemetry.serializers import FrameBody
from esper.contracts import (
    MAX_LAYERS,
    MAX_NAME_LENGTH,
    CommandState,
    LayerInfo,
    RemedyKind,
    RunMode,
    RunState,
    Severity,
    ViolationRule,
    codec,
)
from esper.exceptions import CodecError

MAX_VERSIONS = 100
MAX_DEVICES = 64
MAX_FAILURES = 100
MAX_DETAILS_BYTES = 4_000
ANSWERS = frozenset(CommandState) - {CommandState.ISSUED, CommandState.EXPIRED}


@extend_schema_field({"type": "object", "additionalProperties": True})
class LayerField(serializers.Field[LayerInfo, Any, Any, LayerInfo]):
    """``esper.contracts.LayerInfo``; checked by hand, since thousands of them come at once."""

    default_error_messages = {"invalid": "{why}"}

    def to_internal_value(self, data: Any) -> LayerInfo:
        if not isinstance(data, dict):
            self.fail("invalid", why="A layer is an object.")
        known = {name: value for name, value in data.items() if name in _LAYER_MEMBERS}
        for name, value in known.items():
            if not _LAYER_MEMBERS[name](value):
                self.fail("invalid", why=f"{name} has the wrong type or is too long.")
        try:
            return LayerInfo.from_wire(known)
        except CodecError as error:
            self.fail("invalid", why=str(error))

    def to_representation(self, value: LayerInfo) -> Any:
        return value.to_wire()


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME_LENGTH


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_sequence_axis(value: Any) -> bool:
    return _is_whole(value) and -1 <= value <= 1


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 16 and all(map(_is_whole, value))


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 256 and all(map(_is_text, value))


_LAYER_MEMBERS: dict[str, Callable[[Any], bool]] = {
    "name": lambda value: _is_text(value) and value != "",
    "kind": _is_text,
    "in_shape": _is_shape,
    "out_shape": _is_shape,
    "dtype": _is_text,
    "parameters": _is_whole,
    "graftable": _is_flag,
    "reason": lambda value: isinstance(value, str) and len(value) <= 1000,
    "features_in": _is_whole,
    "features_out": _is_whole,
    "channel_axis": _is_whole,
    "device": _is_text,
    "order": _is_whole,
    "calls": _is_whole,
    "trainable": _is_flag,
    "feeds": _is_names,
    "kernel_size": _is_shape,
    "stride": _is_shape,
    "padding": _is_shape,
    "dilation": _is_shape,
    "groups": _is_whole,
    "head_width": _is_whole,
    "cached_channels": _is_shape,
    "looks_ahead": _is_flag,
    "sequence_axis": _is_sequence_axis,
}


class RunInput(serializers.Serializer[Any]):
    name = Text(max_length=MAX_NAME_LENGTH)
    mode = serializers.ChoiceField(choices=list(RunMode))
    host = Text(max_length=120, allow_blank=True)
    capability = Text(max_length=40)
    capabilities = BoundedDict(child=Text(max_length=40), max_length=MAX_DEVICES, default=dict)
    target_steps = WholeNumber(allow_null=True, default=None)
    versions = BoundedDict(
        child=Text(max_length=80, allow_blank=True), max_length=MAX_VERSIONS, default=dict
    )
    model_parameters = WholeNumber()
    layers = BoundedList(child=LayerField(), max_length=2 * MAX_LAYERS)


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
    merged = Flag(default=False)


class HelloInput(serializers.Serializer[Any]):
    epoch = WholeNumber()
    step = WholeNumber()
    applied = BoundedList(child=AppliedInput(), max_length=MAX_LAYERS)


class SettledOutput(serializers.Serializer[Any]):
    adaptation = serializers.CharField()
    state = serializers.CharField()


class HelloOutput(serializers.Serializer[Any]):
    settled = SettledOutput(many=True)


class CertificateInput(serializers.Serializer[Any]):
    """``esper.contracts.Certificate``: pages count on the type of each member."""

    max_abs_diff = WireNumber()
    tolerance = WireNumber()
    preserving = Flag()
    live = Flag()
    rng_neutral = Flag()
    parameters = WholeNumber()
    parameters_declared = WholeNumber()
    undo_exact = Flag(allow_null=True, default=None)
    host_untouched = Flag(allow_null=True, default=None)
    memory_mib = WireNumber()
    latency_ms = WireNumber()
    failures = BoundedList(child=Text(), max_length=MAX_FAILURES)


class AckInput(serializers.Serializer[Any]):
    """``esper.contracts.CommandAck`` and the trainer's epoch."""

    epoch = WholeNumber()
    state = serializers.ChoiceField(choices=[state for state in CommandState if state in ANSWERS])
    step = WholeNumber(min_value=-1, default=-1)
    pause_ms = WireNumber(default=0.0)
    code = Text(max_length=30, allow_blank=True, default="")
    reason = Text(allow_blank=True, default="")
    certificate = CertificateInput(allow_null=True, default=None)
    digest_before = Text(max_length=64, allow_blank=True, default="")
    digest_after = Text(max_length=64, allow_blank=True, default="")
    speedup = WireNumber(allow_null=True, default=None)


class AckOutput(serializers.Serializer[Any]):
    adaptation_state = serializers.CharField(allow_blank=True)


@extend_schema_field({"oneOf": [{"type": "number"}, {"type": "string"}]})
class Reading(serializers.Field[str, Any, Any, str]):
    """A measured number, or words about it; kept as text."""

    default_error_messages = {"invalid": "A number or a text is required."}

    def to_internal_value(self, data: Any) -> str:
        if isinstance(data, str) and len(data) <= 200:
            return data
        if isinstance(data, bool) or not isinstance(data, int | float):
            self.fail("invalid")
        return f"{data:.6g}"

    def to_representation(self, value: str) -> str:
        return value


class RollbackInput(serializers.Serializer[Any]):
    epoch = WholeNumber()
    adaptation = Text(max_length=64)
    step = WholeNumber()
    rule = serializers.ChoiceField(choices=list(ViolationRule))
    observed = Reading()
    limit = Reading()
    pause_ms = WireNumber(default=0.0)
    exact = Flag()
    digest_after = Text(max_length=64, allow_blank=True, default="")


class Details(Members):
    """What a remedy tells of itself; it is shown and audited, so it is short."""

    default_error_messages = {"too_long": "At most {most} bytes of JSON are taken."}

    def to_internal_value(self, data: Any) -> dict[str, Any]:
        details = super().to_internal_value(data)
        if len(codec.encode(details)) > MAX_DETAILS_BYTES:
            self.fail("too_long", most=MAX_DETAILS_BYTES)
        return details


class RemedyInput(serializers.Serializer[Any]):
    epoch = WholeNumber()
    key = Text(max_length=64)
    remedy = serializers.ChoiceField(choices=list(RemedyKind))
    layer = Text(max_length=MAX_NAME_LENGTH)
    step = WholeNumber()
    details = Details(default=dict)
    pause_ms = WireNumber(default=0.0)
    exact = Flag(allow_null=True, default=None)
    adaptation = Text(max_length=64, allow_blank=True, default="")
    undoes = Text(max_length=64, allow_blank=True, default="")
    digest_before = Text(max_length=64, allow_blank=True, default="")
    digest_after = Text(max_length=64, allow_blank=True, default="")


class FinishInput(serializers.Serializer[Any]):
    epoch = WholeNumber()
    state = serializers.ChoiceField(choices=[RunState.FINISHED, RunState.FAILED])
    step = WholeNumber()
    reason = Text(allow_blank=True, default="")


class MetricsBody(serializers.Serializer[Any]):
    step = WholeNumber()
    wall_time = serializers.FloatField()
    values = serializers.DictField(child=WireNumber())


class FindingBody(serializers.Serializer[Any]):
    rule = serializers.ChoiceField(choices=list(ViolationRule))
    layer = serializers.CharField(allow_blank=True)
    severity = serializers.ChoiceField(choices=list(Severity))
    observed = serializers.CharField()
    limit = serializers.CharField()
    remedy = serializers.CharField()


class TelemetryInput(serializers.Serializer[Any]):
    """For the API's document only; ``apps.trainers.telemetry`` checks what really comes."""

    epoch = WholeNumber()
    seq_from = WholeNumber(min_value=1)
    seq_to = WholeNumber(min_value=1)
    frames = FrameBody(many=True, required=False)
    metrics = MetricsBody(many=True, required=False)
    findings = FindingBody(many=True, required=False)
    dropped = WholeNumber(default=0)


class IngestedOutput(serializers.Serializer[Any]):
    stored = serializers.IntegerField()
    duplicate = serializers.BooleanField()
    slow_down_ms = serializers.IntegerField()


class CommandOutput(serializers.Serializer[Any]):
    """``esper.contracts.Command`` and the server's signature over it."""

    command = Members()
    signature = serializers.CharField()
