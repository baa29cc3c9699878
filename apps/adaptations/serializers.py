from __future__ import annotations

from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from apps.accounts.serializers import PermissionOutput
from apps.adaptations.models import Adaptation
from apps.rest.fields import (
    BoundedDict,
    BoundedList,
    FiniteNumber,
    Flag,
    Members,
    PersonsInput,
    Text,
    WholeNumber,
    WireNumber,
)
from esper.contracts import MAX_NAME_LENGTH, AdaptationType, Risk, ViolationRule

MAX_LINES = 200
MAX_NUMBERS = 500


class AdaptationOutput(serializers.ModelSerializer[Adaptation]):
    number = serializers.IntegerField()
    run = serializers.CharField(source="run.uid")
    run_name = serializers.CharField(source="run.name")
    blueprint = serializers.CharField(source="blueprint.slug")
    config = Members()
    asks = serializers.ListField(child=serializers.CharField())
    decided_by = serializers.CharField(source="decided_by.username", default=None, allow_null=True)
    claimed_by = serializers.CharField(source="claimed_by.username", default=None, allow_null=True)

    class Meta:
        model = Adaptation
        fields: tuple[str, ...] = (
            "uid",
            "number",
            "run",
            "run_name",
            "run_epoch",
            "layer",
            "adaptation_type",
            "blueprint",
            "config",
            "risk",
            "confidence",
            "urgency",
            "asks",
            "state",
            "version",
            "proposed_step",
            "deadline_at",
            "created_at",
            "changed_at",
            "ended_at",
            "decided_by",
            "decided_rule",
            "decision_reason",
            "decided_at",
            "claimed_by",
            "claimed_until",
            "graft_step",
            "pause_ms",
            "reward",
            "end_reason",
        )


class AdaptationDetailOutput(AdaptationOutput):
    evidence = Members()
    evidence_now = serializers.SerializerMethodField()
    evidence_drift = serializers.SerializerMethodField()
    reasons = serializers.ListField(child=Members())
    checks = serializers.ListField(child=Members())
    why_not = serializers.ListField(child=Members())
    undo_plan = serializers.SerializerMethodField()
    permissions = serializers.SerializerMethodField()
    certificate = Members(allow_null=True)
    reward_terms = Members(allow_null=True)
    policy_version = serializers.IntegerField(source="safety_policy.version")
    kernel = serializers.CharField(source="kernel.digest", default=None, allow_null=True)
    job = serializers.CharField(source="job.uid", default=None, allow_null=True)

    class Meta(AdaptationOutput.Meta):
        fields: tuple[str, ...] = (
            *AdaptationOutput.Meta.fields,
            "forecast_parameters",
            "forecast_flops",
            "forecast_memory_mib",
            "forecast_latency_ms",
            "policy",
            "policy_version",
            "evidence",
            "evidence_hash",
            "evidence_now",
            "evidence_drift",
            "reasons",
            "checks",
            "why_not",
            "undo_plan",
            "permissions",
            "extensions",
            "job",
            "kernel",
            "grafted_at",
            "certificate",
            "digest_before",
            "digest_after",
            "undo_exact",
            "ablation_gain",
            "forecast_gain",
            "forecast_interval",
            "steps_observed",
            "kept_at",
            "merged_at",
            "reward_terms",
        )

    @extend_schema_field(Members)
    def get_evidence_now(self, adaptation: Adaptation) -> Any:
        return self.context["evidence_now"]

    @extend_schema_field(WireNumber(allow_null=True))
    def get_evidence_drift(self, adaptation: Adaptation) -> Any:
        """1.0 is all that is tolerated; null: unknown."""
        return self.context["evidence_drift"]

    @extend_schema_field(serializers.ListField(child=serializers.CharField()))
    def get_undo_plan(self, adaptation: Adaptation) -> Any:
        return self.context["undo_plan"]

    @extend_schema_field(serializers.DictField(child=PermissionOutput()))
    def get_permissions(self, adaptation: Adaptation) -> Any:
        return PermissionOutput.of(self.context["permissions"])


class ActInput(PersonsInput):
    reason = Text(allow_blank=True, default="")
    evidence_hash = Text(max_length=64, allow_blank=True, default="")


class ApproveInput(ActInput):
    """``accept_drift``: the new numbers were seen, and it shall happen all the same."""

    accept_drift = Flag(default=False)


class ReasonLine(serializers.Serializer[Any]):
    signal = Text(max_length=120)
    observed = WireNumber()
    weight = WireNumber()
    text = Text(max_length=1000)


class CheckLine(serializers.Serializer[Any]):
    rule = serializers.ChoiceField(choices=list(ViolationRule))
    passed = Flag(allow_null=True)
    hard = Flag()
    observed = Text(max_length=500, allow_blank=True)
    limit = Text(max_length=500, allow_blank=True)
    text = Text(max_length=1000)


class WhyNotLine(serializers.Serializer[Any]):
    blueprint = Text(max_length=60)
    reason = Text(max_length=1000)


class ForecastInput(serializers.Serializer[Any]):
    parameters = WholeNumber()
    flops = WholeNumber()
    memory_mib = WireNumber()
    latency_ms = WireNumber()


class ProposalInput(serializers.Serializer[Any]):
    epoch = WholeNumber()
    step = WholeNumber()
    layer = Text(max_length=MAX_NAME_LENGTH)
    adaptation_type = serializers.ChoiceField(choices=list(AdaptationType))
    confidence = WireNumber()
    urgency = WireNumber()
    reasons = BoundedList(child=ReasonLine(), max_length=MAX_LINES)
    blueprint = Text(max_length=60)
    config = Members()
    risk = serializers.ChoiceField(choices=list(Risk))
    forecast = ForecastInput()
    checks = BoundedList(child=CheckLine(), max_length=MAX_LINES)
    why_not = BoundedList(child=WhyNotLine(), max_length=MAX_LINES)
    asks = BoundedList(child=Text(max_length=1000), max_length=MAX_LINES)
    evidence = BoundedDict(child=WireNumber(), max_length=MAX_NUMBERS)
    policy = Text(max_length=40)


class DeclineInput(serializers.Serializer[Any]):
    epoch = WholeNumber()
    step = WholeNumber()
    layer = Text(max_length=MAX_NAME_LENGTH)
    adaptation_type = serializers.ChoiceField(choices=list(AdaptationType))
    confidence = WireNumber()
    reasons = BoundedList(child=Text(max_length=1000), max_length=MAX_LINES)
    checks = BoundedList(child=CheckLine(), max_length=MAX_LINES)


class VerdictInput(serializers.Serializer[Any]):
    keep = Flag()
    reason = Text()
    ablation_gain = WireNumber()
    forecast_gain = WireNumber()
    forecast_interval = WireNumber()
    steps_observed = WholeNumber()
    reward = BoundedDict(child=FiniteNumber(), max_length=MAX_NUMBERS)


class ExperienceOutput(serializers.Serializer[Any]):
    """``mean_reward`` null: no reward is known."""

    blueprint = serializers.CharField()
    kept = serializers.IntegerField()
    rolled_back = serializers.IntegerField()
    mean_reward = serializers.FloatField(allow_null=True)


class ActiveOutput(serializers.Serializer[Any]):
    uid = serializers.CharField()
    state = serializers.CharField()
    layer = serializers.CharField()
    blueprint = serializers.CharField()
    kind = serializers.CharField()
    risk = serializers.CharField()
    graft_step = serializers.IntegerField(allow_null=True)
    deadline_at = serializers.DateTimeField(allow_null=True)


class SnapshotOutput(serializers.Serializer[Any]):
    """Everything that ``esper.pipeline.decide`` needs to know of a run."""

    run = serializers.CharField()
    epoch = serializers.IntegerField()
    mode = serializers.CharField()
    step = serializers.IntegerField()
    layers = serializers.ListField(child=Members())
    frames = serializers.ListField(child=Members())
    metrics = serializers.ListField(child=Members())
    model_parameters = serializers.IntegerField()
    added_parameters = serializers.IntegerField()
    adaptations_today = serializers.IntegerField()
    in_flight = serializers.IntegerField()
    last_adaptation_step = serializers.IntegerField()
    frozen = serializers.CharField(allow_blank=True)
    history = Members()
    experience = Members()
    disabled_blueprints = serializers.ListField(child=serializers.CharField())
    safety_policy = Members()
    policy_version = serializers.IntegerField()
    active = ActiveOutput(many=True)


class IntegrationStatusOutput(serializers.Serializer[Any]):
    """The four keys of the seed document."""

    active_adaptations = Members()
    blueprint_cache_stats = Members()
    execution_metrics = Members()
    safety_violations = serializers.ListField(child=Members())
