"""Plans as the API answers them."""

from __future__ import annotations

from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from apps.accounts.serializers import PermissionOutput
from apps.adaptations.models import Plan
from apps.adaptations.serializers import ActInput, AdaptationOutput
from apps.rest.fields import Digest, Flag, Members


class PlanOutput(serializers.ModelSerializer[Plan]):
    number = serializers.IntegerField()
    title = serializers.CharField()
    run = serializers.CharField(source="run.uid")
    run_name = serializers.CharField(source="run.name")
    decided_by = serializers.CharField(source="decided_by.username", default=None, allow_null=True)
    taken_back_by = serializers.CharField(
        source="taken_back_by.username", default=None, allow_null=True
    )

    class Meta:
        model = Plan
        fields: tuple[str, ...] = (
            "uid",
            "number",
            "title",
            "run",
            "run_name",
            "run_epoch",
            "state",
            "version",
            "policy",
            "proposed_step",
            "value",
            "best",
            "deadline_at",
            "created_at",
            "changed_at",
            "ended_at",
            "decided_by",
            "decided_at",
            "decision_reason",
            "taken_back_by",
            "outcome",
        )


class PlanDetailOutput(PlanOutput):
    """``limits`` hold for the sum of the members, which are in the order of their application."""

    limits = Members()
    reasons = serializers.ListField(child=serializers.CharField())
    asks = serializers.ListField(child=serializers.CharField())
    checks = serializers.ListField(child=Members())
    policy_version = serializers.IntegerField(source="safety_policy.version")
    risk = serializers.SerializerMethodField()
    members = serializers.SerializerMethodField()
    undo = serializers.SerializerMethodField()
    permissions = serializers.SerializerMethodField()

    class Meta(PlanOutput.Meta):
        fields: tuple[str, ...] = (
            *PlanOutput.Meta.fields,
            "policy_version",
            "risk",
            "limits",
            "reasons",
            "asks",
            "checks",
            "evidence_hash",
            "members",
            "undo",
            "permissions",
        )

    @extend_schema_field(serializers.CharField())
    def get_risk(self, plan: Plan) -> Any:
        """Of its riskiest member."""
        return self.context["risk"]

    @extend_schema_field(AdaptationOutput(many=True))
    def get_members(self, plan: Plan) -> Any:
        return AdaptationOutput(self.context["members"], many=True).data

    @extend_schema_field(serializers.ListField(child=serializers.CharField()))
    def get_undo(self, plan: Plan) -> Any:
        """How it would be taken back, in sentences."""
        return self.context["undo"]

    @extend_schema_field(serializers.DictField(child=PermissionOutput()))
    def get_permissions(self, plan: Plan) -> Any:
        return PermissionOutput.of(self.context["permissions"])


class ApprovePlanInput(ActInput):
    """``evidence_hash``: of the whole plan that was shown."""

    evidence_hash = Digest()
    accept_drift = Flag(default=False)
