from __future__ import annotations

from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from apps.accounts.serializers import PermissionOutput
from apps.adaptations.delegations import LONGEST, MOST_USES
from apps.adaptations.models import Adaptation, DecisionRecord, Delegation, ShadowTrial
from apps.adaptations.shadows import MOST_SECONDS, MOST_STEPS, SECONDS, STEPS
from apps.rest.fields import (
    BoundedList,
    Digest,
    Flag,
    Members,
    PersonsInput,
    Text,
    WholeNumber,
    WireNumber,
)
from esper.contracts import AdaptationKind, RejectReason

LONGEST_SNOOZE_MINUTES = 1440
LONGEST_DELEGATION_MINUTES = int(LONGEST.total_seconds() // 60)

MAX_REJECTED_AT_ONCE = 100


class AdaptationOutput(serializers.ModelSerializer[Adaptation]):
    number = serializers.IntegerField()
    run = serializers.CharField(source="run.uid")
    run_name = serializers.CharField(source="run.name")
    kind = serializers.ChoiceField([(k, k) for k in AdaptationKind])
    title = serializers.CharField()
    blueprint = serializers.CharField(source="blueprint.slug", default=None, allow_null=True)
    proposed_by = serializers.CharField(
        source="proposed_by.username", default=None, allow_null=True
    )
    config = Members()
    asks = serializers.ListField(child=serializers.CharField())
    decided_by = serializers.CharField(source="decided_by.username", default=None, allow_null=True)
    claimed_by = serializers.CharField(source="claimed_by.username", default=None, allow_null=True)
    taken_back_by = serializers.CharField(
        source="taken_back_by.username", default=None, allow_null=True
    )
    assigned_to = serializers.CharField(
        source="assigned_to.username", default=None, allow_null=True
    )
    escalated_by = serializers.CharField(
        source="escalated_by.username", default=None, allow_null=True
    )
    edited = Members()
    delegation = serializers.CharField(source="delegation.uid", default=None, allow_null=True)
    plan = serializers.CharField(source="plan.uid", default=None, allow_null=True)

    class Meta:
        model = Adaptation
        fields: tuple[str, ...] = (
            "uid",
            "number",
            "run",
            "run_name",
            "run_epoch",
            "kind",
            "title",
            "layer",
            "since",
            "adaptation_type",
            "blueprint",
            "remedy",
            "finding",
            "proposed_by",
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
            "delegation",
            "plan",
            "plan_place",
            "decision_reason",
            "decided_at",
            "decided_step",
            "claimed_by",
            "claimed_until",
            "assigned_to",
            "escalated_by",
            "escalated_reason",
            "rejected_for",
            "edited",
            "graft_step",
            "pause_ms",
            "reward",
            "end_reason",
            "taken_back_by",
            "taken_back_reason",
        )


class RunningTestOutput(serializers.Serializer[Any]):
    """Where the test of a graft in probation stands; gains are shares of the loss."""

    steps = serializers.IntegerField()
    most_steps = serializers.IntegerField()
    looks = serializers.IntegerField()
    gain = WireNumber()
    gain_low = WireNumber()
    gain_high = WireNumber()
    keep_above = serializers.FloatField()
    out_below = serializers.FloatField()
    forecast_gain = WireNumber()
    forecast_interval = WireNumber()


class VotesOutput(serializers.Serializer[Any]):
    """How many different people must approve it, and who has, where more than one must."""

    needed = serializers.IntegerField()
    by = serializers.ListField(child=serializers.CharField())


class PauseForecastOutput(serializers.Serializer[Any]):
    """How long the step after the graft will wait for torch.compile; null: not known.

    ``seconds`` is for a trainer that can compile beside the training; else it is
    ``unprepared_seconds``. An undo costs none.
    """

    step_ms = serializers.FloatField(allow_null=True)
    recompiles = serializers.BooleanField(allow_null=True)
    seconds = serializers.FloatField(allow_null=True)
    unprepared_seconds = serializers.FloatField(allow_null=True)


class ShadowOutput(serializers.ModelSerializer[ShadowTrial]):
    """A trial on a copy of the run; the gain is a share of the held-out loss, null: not shown."""

    state = serializers.CharField()
    reason = serializers.CharField(source="command.reason")
    asked_by = serializers.CharField(source="asked_by.username", default=None, allow_null=True)
    variant = serializers.CharField(source="variant.uid", default=None, allow_null=True)

    class Meta:
        model = ShadowTrial
        fields = (
            "uid",
            "variant",
            "state",
            "reason",
            "asked_by",
            "created_at",
            "most_steps",
            "most_seconds",
            "gain",
            "low",
            "high",
            "steps",
            "looks",
            "seconds",
        )


class AdaptationDetailOutput(AdaptationOutput):
    shadows = serializers.SerializerMethodField()
    evidence = Members()
    evidence_now = serializers.SerializerMethodField()
    evidence_drift = serializers.SerializerMethodField()
    running_test = serializers.SerializerMethodField()
    pause_forecast = serializers.SerializerMethodField()
    reasons = serializers.ListField(child=Members())
    checks = serializers.ListField(child=Members())
    why_not = serializers.ListField(child=Members())
    undo_plan = serializers.SerializerMethodField()
    permissions = serializers.SerializerMethodField()
    votes = serializers.SerializerMethodField()
    found = Members(allow_null=True)
    details = Members()
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
            "found",
            "evidence",
            "evidence_hash",
            "evidence_now",
            "evidence_drift",
            "shadows",
            "pause_forecast",
            "reasons",
            "checks",
            "why_not",
            "undo_plan",
            "permissions",
            "votes",
            "extensions",
            "job",
            "kernel",
            "grafted_at",
            "details",
            "certificate",
            "digest_before",
            "digest_after",
            "undo_exact",
            "running_test",
            "ablation_gain",
            "ablation_low",
            "ablation_high",
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
        """A share of the tolerance: above 1.0 an approval needs ``accept_drift``; null: unknown."""
        return self.context["evidence_drift"]

    @extend_schema_field(ShadowOutput(many=True))
    def get_shadows(self, adaptation: Adaptation) -> Any:
        """Newest first."""
        return ShadowOutput(self.context["shadows"], many=True).data

    @extend_schema_field(PauseForecastOutput)
    def get_pause_forecast(self, adaptation: Adaptation) -> Any:
        return PauseForecastOutput(self.context["pause_forecast"]).data

    @extend_schema_field(RunningTestOutput(allow_null=True))
    def get_running_test(self, adaptation: Adaptation) -> Any:
        """Null outside probation."""
        test = self.context["running_test"]
        return None if test is None else RunningTestOutput(test).data

    @extend_schema_field(serializers.ListField(child=serializers.CharField()))
    def get_undo_plan(self, adaptation: Adaptation) -> Any:
        return self.context["undo_plan"]

    @extend_schema_field(VotesOutput)
    def get_votes(self, adaptation: Adaptation) -> Any:
        return VotesOutput(self.context["votes"]).data

    @extend_schema_field(serializers.DictField(child=PermissionOutput()))
    def get_permissions(self, adaptation: Adaptation) -> Any:
        return PermissionOutput.of(self.context["permissions"])


class ActInput(PersonsInput):
    reason = Text(allow_blank=True, default="")


class RejectionInput(PersonsInput):
    """One adaptation, and the version that the person was shown."""

    uid = Text(max_length=32)
    version = WholeNumber()


class BulkRejectInput(PersonsInput):
    adaptations = BoundedList(
        child=RejectionInput(), allow_empty=False, max_length=MAX_REJECTED_AT_ONCE
    )
    reason = Text()


class RejectionOutput(serializers.Serializer[Any]):
    """``problem`` null: it is rejected; else the problem document of this one."""

    uid = serializers.CharField()
    status = serializers.IntegerField()
    state = serializers.CharField(allow_null=True)
    problem = Members(allow_null=True)


class BulkRejectOutput(serializers.Serializer[Any]):
    rejected = serializers.IntegerField()
    results = RejectionOutput(many=True)


class MoveInput(PersonsInput):
    """``project``: uid of the project to move the run to."""

    project = Text(max_length=40)
    reason = Text(allow_blank=True, default="")


class ApproveInput(ActInput):
    """An approval of what was shown.

    ``accept_drift``: the person has seen the new numbers and approves in spite of them.
    ``config``: settings that they change first; all gates are checked again. A number of a graft
    may only become smaller.
    """

    evidence_hash = Digest()
    accept_drift = Flag(default=False)
    config = Members(default=dict)


class RejectInput(ActInput):
    """A code, own words in ``reason``, or both; the code ``other`` needs words."""

    reason_code = serializers.ChoiceField(choices=list(RejectReason), allow_blank=True, default="")


class AssignInput(ActInput):
    """``to``: the username of the person who shall decide; empty: nobody any more."""

    to = Text(max_length=150, allow_blank=True)


class ShadowInput(PersonsInput):
    """``steps`` of both copies, and ``seconds`` of the trainer's time, at most.

    ``variant``: uid of the one that is tried instead of the proposed size.
    """

    steps = WholeNumber(min_value=1, max_value=MOST_STEPS, default=STEPS)
    seconds = WholeNumber(min_value=1, max_value=MOST_SECONDS, default=SECONDS)
    variant = Text(max_length=32, allow_blank=True, default="")
    reason = Text(allow_blank=True, default="")


class SnoozeInput(PersonsInput):
    """``minutes`` 0 ends it."""

    minutes = WholeNumber(max_value=LONGEST_SNOOZE_MINUTES)


class CheckNowOutput(serializers.Serializer[Any]):
    """``passed`` null: unknown, which is never counted as passed."""

    rule = serializers.CharField()
    passed = serializers.BooleanField(allow_null=True)
    hard = serializers.BooleanField()
    observed = serializers.CharField()
    limit = serializers.CharField()
    text = serializers.CharField()


class DryRunOutput(serializers.Serializer[Any]):
    """What an approval would check and do now. ``steps``: sentences, in order."""

    permission = PermissionOutput()
    checks = CheckNowOutput(many=True)
    drift = WireNumber(allow_null=True)
    steps = serializers.ListField(child=serializers.CharField())


class AttestationOutput(serializers.Serializer[Any]):
    """``event``: the audit event; ``shown``: what it was about; ``signature`` covers both."""

    event = Members()
    shown = Members()
    signature = serializers.CharField()


class RemedyInput(PersonsInput):
    """``layer`` empty: the whole run. A setting that ``config`` leaves out takes its default."""

    remedy = Text(max_length=60)
    layer = Text(max_length=255, allow_blank=True, default="")
    config = Members(default=dict)
    reason = Text(allow_blank=True, default="")


class DelegationInput(PersonsInput):
    """``limits``: name of a number setting → [lowest, highest]; other settings keep their default.

    Of a setting that multiplies, the limits hold for all uses together.
    """

    remedy = Text(max_length=60)
    limits = Members(default=dict)
    minutes = WholeNumber(min_value=1, max_value=LONGEST_DELEGATION_MINUTES)
    most_uses = WholeNumber(min_value=1, max_value=MOST_USES, default=3)
    reason = Text()


class DelegationOutput(serializers.ModelSerializer[Delegation]):
    """``used``: how many remedies went without a person under it."""

    number = serializers.IntegerField()
    run = serializers.CharField(source="run.uid")
    granted_by = serializers.CharField(source="granted_by.username")
    revoked_by = serializers.CharField(source="revoked_by.username", default=None, allow_null=True)
    limits = Members()
    used = serializers.SerializerMethodField()

    class Meta:
        model = Delegation
        fields: tuple[str, ...] = (
            "uid",
            "number",
            "run",
            "remedy",
            "limits",
            "in_words",
            "most_uses",
            "used",
            "until",
            "reason",
            "granted_by",
            "created_at",
            "revoked_at",
            "revoked_by",
        )

    def get_used(self, delegation: Delegation) -> int:
        return delegation.uses.count()


class ExperienceOutput(serializers.Serializer[Any]):
    """``mean_reward`` null: no reward is known."""

    blueprint = serializers.CharField()
    kept = serializers.IntegerField()
    rolled_back = serializers.IntegerField()
    mean_reward = serializers.FloatField(allow_null=True)


class DecisionOutput(serializers.ModelSerializer[DecisionRecord]):
    """``adaptation`` null: it was declined. ``note``: why no snapshot is stored."""

    adaptation = serializers.CharField(source="adaptation.uid", default=None, allow_null=True)
    message = Members()

    class Meta:
        model = DecisionRecord
        fields = (
            "uid",
            "adaptation",
            "run_epoch",
            "step",
            "layer",
            "message",
            "note",
            "created_at",
        )


class IntegrationStatusOutput(serializers.Serializer[Any]):
    """The four keys of the seed document."""

    active_adaptations = Members()
    blueprint_cache_stats = Members()
    execution_metrics = Members()
    safety_violations = serializers.ListField(child=Members())
