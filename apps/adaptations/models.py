"""Adaptations from proposal to end, and the remedies that training scripts apply by themselves.

Only ``lifecycle.transition`` writes an adaptation's ``state``.
"""

from __future__ import annotations

from functools import partial

from django.conf import settings
from django.db import models

from apps.accounts.visibility import InProjects, of_adaptation, of_run
from apps.blueprints.models import Blueprint, Variant
from apps.kernels.models import Kernel
from apps.policies.models import PolicyVersion
from apps.rest.identifiers import UID_LENGTH, new_uid
from apps.runs.models import Command, Run
from apps.workers.models import CompileJob
from esper.contracts import (
    ADAPTATION_ENDED,
    ADAPTATION_GRAFTED,
    MAX_NAME_LENGTH,
    PLAN_ENDED,
    AdaptationKind,
    AdaptationState,
    AdaptationType,
    CommandState,
    PlanState,
    RejectReason,
    Risk,
)

# ``policy`` of an adaptation that a restored database has lost, and that its trainer has reported.
RECOVERED = "recovered"


class Plan(models.Model):
    """Several grafts of one run that are approved once, applied in order and undone as a whole.

    Only ``plan_progress.move_plan`` writes its ``state``.
    """

    uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "pln"), editable=False
    )
    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="plans")
    run_epoch = models.PositiveIntegerField()
    idempotency_key = models.CharField(max_length=400, unique=True)
    state = models.CharField(
        max_length=20,
        choices=[(s, s.replace("_", " ")) for s in PlanState],
        default=PlanState.AWAITING_APPROVAL,
        db_index=True,
    )
    version = models.PositiveIntegerField(default=1)
    policy = models.CharField(max_length=40)
    safety_policy = models.ForeignKey(PolicyVersion, on_delete=models.PROTECT)
    proposed_step = models.BigIntegerField()
    value = models.FloatField(null=True)
    best = models.BooleanField(default=True)  # shown by the solver; false: its time was up
    limits = models.JSONField(default=dict)  # of the sum of its members, by name
    reasons = models.JSONField(default=list)
    asks = models.JSONField(default=list)
    checks = models.JSONField(default=list)  # of the sum; each member has its own
    evidence_hash = models.CharField(max_length=64)
    deadline_at = models.DateTimeField()  # of the approval
    created_at = models.DateTimeField(auto_now_add=True)
    changed_at = models.DateTimeField(auto_now=True)
    ended_at = models.DateTimeField(null=True, blank=True)
    decided_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+"
    )
    decided_at = models.DateTimeField(null=True, blank=True)
    decision_reason = models.TextField(blank=True)
    taken_back_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+"
    )
    outcome = models.TextField(blank=True)  # why it is taken back, and what came of it

    objects = InProjects["Plan"]()
    visible_in = staticmethod(of_run)

    class Meta:
        ordering = ("-id",)
        constraints = (
            models.CheckConstraint(
                condition=models.Q(state__in=sorted(PlanState)), name="plan_state_is_known"
            ),
        )

    def __str__(self) -> str:
        return f"P-{self.pk} {self.title}"

    @property
    def number(self) -> int:
        return self.pk

    @property
    def title(self) -> str:
        """For people."""
        return f"Plan of {self.members.count()} changes for run {self.run.name}"

    @property
    def ended(self) -> bool:
        return self.state in PLAN_ENDED


class Adaptation(models.Model):
    uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "adp"), editable=False
    )
    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="adaptations")
    run_epoch = models.PositiveIntegerField()
    idempotency_key = models.CharField(max_length=400, unique=True)
    # what is proposed: a graft of a blueprint, or a remedy
    layer = models.CharField(max_length=MAX_NAME_LENGTH, blank=True)  # empty: the whole run
    # of a graft that spans layers: the earlier layer, whose input it reads
    since = models.CharField(max_length=MAX_NAME_LENGTH, blank=True)
    adaptation_type = models.CharField(
        max_length=20, choices=[(t, t) for t in AdaptationType], blank=True
    )
    blueprint = models.ForeignKey(Blueprint, on_delete=models.PROTECT, null=True, blank=True)
    remedy = models.CharField(max_length=60, blank=True)  # slug; empty: a graft
    in_words = models.CharField(max_length=300, blank=True)  # of a remedy, with its settings
    config = models.JSONField(default=dict)
    risk = models.CharField(max_length=8, choices=[(r, r) for r in Risk])
    confidence = models.FloatField(null=True)  # null: unknown, never high
    urgency = models.FloatField(null=True)
    # where it is a member of a plan: which, and its place in the order
    plan = models.ForeignKey(
        Plan, on_delete=models.SET_NULL, null=True, blank=True, related_name="members"
    )
    plan_place = models.PositiveSmallIntegerField(null=True, blank=True)
    # whose size it has; null: one of the blueprint's own
    variant = models.ForeignKey(
        Variant, on_delete=models.PROTECT, null=True, blank=True, related_name="adaptations"
    )
    forecast_parameters = models.BigIntegerField(default=0)
    forecast_flops = models.BigIntegerField(default=0)
    forecast_memory_mib = models.FloatField(null=True)
    forecast_latency_ms = models.FloatField(null=True)
    # why: frozen at the proposal
    policy = models.CharField(max_length=40, blank=True)
    finding = models.CharField(max_length=64, blank=True)  # the rule whose finding it answers
    found = models.JSONField(null=True, blank=True)  # that finding as the trainer sent it
    proposed_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+"
    )
    safety_policy = models.ForeignKey(PolicyVersion, on_delete=models.PROTECT)
    proposed_step = models.BigIntegerField()
    evidence = models.JSONField(default=dict)  # numbers by name; null: unknown
    reasons = models.JSONField(default=list)
    checks = models.JSONField(default=list)
    why_not = models.JSONField(default=list)
    asks = models.JSONField(default=list)  # why a person is asked; empty: nobody is
    evidence_hash = models.CharField(max_length=64)
    # where it is
    state = models.CharField(
        max_length=20,
        choices=[(s, s.replace("_", " ")) for s in AdaptationState],
        default=AdaptationState.PROPOSED,
        db_index=True,
    )
    version = models.PositiveIntegerField(default=1)
    deadline_at = models.DateTimeField(null=True, blank=True, db_index=True)
    created_at = models.DateTimeField(auto_now_add=True)
    changed_at = models.DateTimeField(auto_now=True)
    ended_at = models.DateTimeField(null=True, blank=True)
    # who decided
    decided_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+"
    )
    decided_rule = models.CharField(max_length=200, blank=True)
    decision_reason = models.TextField(blank=True)
    delegation = models.ForeignKey(  # the standing approval that let it go alone
        "Delegation", on_delete=models.PROTECT, null=True, blank=True, related_name="uses"
    )
    decided_at = models.DateTimeField(null=True, blank=True)
    # what was seen when the decision was made, by a person, by a rule or by the deadline
    decided_step = models.BigIntegerField(null=True, blank=True)
    decided_evidence = models.JSONField(null=True, blank=True)  # as ``evidence``
    decided_drift = models.FloatField(null=True, blank=True)  # share of the tolerance; may be inf
    claimed_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+"
    )
    claimed_until = models.DateTimeField(null=True, blank=True)
    extensions = models.PositiveSmallIntegerField(default=0)
    unanswered_at = models.DateTimeField(null=True, blank=True)  # everybody was told then
    rejected_for = models.CharField(
        max_length=16, choices=[(r, r.replace("_", " ")) for r in RejectReason], blank=True
    )
    # settings that the approver changed: name -> [as proposed, as approved]
    edited = models.JSONField(default=dict)
    assigned_to = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+"
    )
    escalated_by = models.ForeignKey(  # from then on only an admin approves
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+"
    )
    escalated_reason = models.TextField(blank=True)
    # how it was done
    job = models.ForeignKey(CompileJob, on_delete=models.SET_NULL, null=True, blank=True)
    kernel = models.ForeignKey(Kernel, on_delete=models.PROTECT, null=True, blank=True)
    graft_step = models.BigIntegerField(null=True, blank=True)
    grafted_at = models.DateTimeField(null=True, blank=True)
    pause_ms = models.FloatField(null=True, blank=True)
    certificate = models.JSONField(null=True, blank=True)
    details = models.JSONField(default=dict)  # what a remedy did, by its receipt
    digest_before = models.CharField(max_length=64, blank=True)
    digest_after = models.CharField(max_length=64, blank=True)
    # how it ended
    end_reason = models.TextField(blank=True)
    taken_back_by = models.ForeignKey(  # the person who cancelled it or asked for its rollback
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+"
    )
    taken_back_reason = models.TextField(blank=True)
    ended_step = models.BigIntegerField(null=True, blank=True)  # the run's last reported one
    undo_exact = models.BooleanField(null=True, blank=True)
    ablation_gain = models.FloatField(null=True, blank=True)
    ablation_low = models.FloatField(null=True, blank=True)
    ablation_high = models.FloatField(null=True, blank=True)
    forecast_gain = models.FloatField(null=True, blank=True)
    forecast_interval = models.FloatField(null=True, blank=True)
    steps_observed = models.BigIntegerField(null=True, blank=True)
    kept_at = models.DateTimeField(null=True, blank=True)
    merged_at = models.DateTimeField(null=True, blank=True)  # into its host: it cannot be taken out
    reward_terms = models.JSONField(null=True, blank=True)
    reward = models.FloatField(null=True, blank=True)

    objects = InProjects["Adaptation"]()
    visible_in = staticmethod(of_run)

    class Meta:
        ordering = ("-id",)
        constraints = (
            models.UniqueConstraint(
                fields=("run", "layer"),
                condition=~models.Q(state__in=sorted(ADAPTATION_ENDED)) & models.Q(remedy=""),
                name="one_adaptation_in_flight_per_layer",
            ),
            models.UniqueConstraint(
                fields=("run", "finding"),
                condition=~models.Q(state__in=sorted(ADAPTATION_ENDED)) & ~models.Q(finding=""),
                name="one_remedy_in_flight_per_finding",
            ),
            models.CheckConstraint(
                condition=models.Q(remedy="", blueprint__isnull=False)
                | (~models.Q(remedy="") & models.Q(blueprint__isnull=True)),
                name="adaptation_is_a_graft_or_a_remedy",
            ),
            models.CheckConstraint(
                condition=models.Q(state__in=sorted(AdaptationState)),
                name="adaptation_state_is_known",
            ),
        )
        indexes = (
            models.Index(fields=("state", "deadline_at"), name="adaptation_deadlines"),
            models.Index(fields=("changed_at", "id"), name="adaptation_by_change"),
            models.Index(fields=("created_at", "id"), name="adaptation_by_creation"),
            # Sums over all of them read these alone, and not their rows, which are large.
            models.Index(
                fields=(
                    *("blueprint", "state", "graft_step", "reward"),
                    *("confidence", "policy", "remedy", "run"),
                ),
                name="adaptation_by_blueprint",
            ),
            models.Index(
                fields=("decided_at", "decided_by", "decided_rule", "created_at", "run"),
                condition=models.Q(decided_at__isnull=False),
                name="adaptation_by_decision",
            ),
            models.Index(
                fields=("pause_ms", "run"),
                condition=models.Q(pause_ms__isnull=False),
                name="adaptation_by_pause",
            ),
        )

    def __str__(self) -> str:
        return f"A-{self.pk} {self.title}"

    @property
    def kind(self) -> AdaptationKind:
        return AdaptationKind.REMEDY if self.remedy else AdaptationKind.GRAFT

    @property
    def slug(self) -> str:
        """Of its blueprint or its remedy."""
        return self.remedy or self.grafted_blueprint.slug

    @property
    def grafted_blueprint(self) -> Blueprint:
        """Of a graft, which always has one."""
        assert self.blueprint is not None, f"A-{self.pk} is a remedy"
        return self.blueprint

    @property
    def title(self) -> str:
        """What it does, for people."""
        if not self.remedy:
            return f"{self.slug} → {self.place}"
        return f"{self.in_words} at {self.layer}" if self.layer else self.in_words

    @property
    def place(self) -> str:
        """Where it is, for people; of a graft that spans layers with its size."""
        if not self.since:
            return self.layer
        units = f", {self.config['hidden']} units" if "hidden" in self.config else ""
        return f"parallel to {self.since} … {self.layer}{units}"

    @property
    def number(self) -> int:
        return self.pk

    @property
    def ended(self) -> bool:
        return self.state in ADAPTATION_ENDED

    @property
    def grafted(self) -> bool:
        return self.state in ADAPTATION_GRAFTED


class Delegation(models.Model):
    """A person's approval, given ahead, of one remedy in one run: limited, expiring, revocable.

    Attributes:
        limits: name of a setting -> [lowest, highest]; every other setting keeps its default.
    """

    uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "dlg"), editable=False
    )
    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="delegations")
    granted_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+"
    )
    remedy = models.CharField(max_length=60)  # slug
    limits = models.JSONField(default=dict)
    in_words = models.CharField(max_length=300)
    most_uses = models.PositiveSmallIntegerField()
    until = models.DateTimeField()
    reason = models.TextField()
    created_at = models.DateTimeField(auto_now_add=True)
    revoked_at = models.DateTimeField(null=True, blank=True)
    revoked_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+"
    )

    objects = InProjects["Delegation"]()
    visible_in = staticmethod(of_run)

    class Meta:
        ordering = ("-id",)

    def __str__(self) -> str:
        return f"{self.in_words} in R-{self.run_id}"

    @property
    def number(self) -> int:
        return self.pk


class Vote(models.Model):
    """One person's approval of an adaptation that needs more than one."""

    adaptation = models.ForeignKey(Adaptation, on_delete=models.CASCADE, related_name="votes")
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    evidence_hash = models.CharField(max_length=64)  # of what was approved; an edit voids the vote
    reason = models.TextField(blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("id",)
        constraints = (
            models.UniqueConstraint(
                fields=("adaptation", "user", "evidence_hash"), name="one_vote_per_person"
            ),
        )

    def __str__(self) -> str:
        return f"{self.user} approves A-{self.adaptation_id}"


class Snooze(models.Model):
    """Until when one person does not want to see an adaptation in their inbox."""

    adaptation = models.ForeignKey(Adaptation, on_delete=models.CASCADE, related_name="snoozes")
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    until = models.DateTimeField()

    class Meta:
        constraints = (
            models.UniqueConstraint(fields=("adaptation", "user"), name="one_snooze_per_person"),
        )

    def __str__(self) -> str:
        return f"A-{self.adaptation_id} until {self.until}"


class ShadowTrial(models.Model):
    """A graft tried on a copy of its run against a copy without it; the command has its state."""

    uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "shd"), editable=False
    )
    adaptation = models.ForeignKey(Adaptation, on_delete=models.CASCADE, related_name="shadows")
    command = models.OneToOneField(Command, on_delete=models.CASCADE, related_name="+")
    asked_by = models.ForeignKey(  # null: one of the random share
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+"
    )
    # what was tried instead of the proposed size; null: that size
    variant = models.ForeignKey(
        Variant, on_delete=models.PROTECT, null=True, blank=True, related_name="trials"
    )
    most_steps = models.PositiveIntegerField()
    most_seconds = models.FloatField()
    created_at = models.DateTimeField(auto_now_add=True)
    # the result: shares of the held-out loss, with the 95 % interval; null: not shown
    gain = models.FloatField(null=True, blank=True)
    low = models.FloatField(null=True, blank=True)
    high = models.FloatField(null=True, blank=True)
    steps = models.BigIntegerField(null=True, blank=True)
    looks = models.PositiveIntegerField(null=True, blank=True)
    seconds = models.FloatField(null=True, blank=True)

    objects = InProjects["ShadowTrial"]()
    visible_in = staticmethod(of_adaptation)

    class Meta:
        ordering = ("-id",)

    def __str__(self) -> str:
        return f"A-{self.adaptation_id} in shadow"

    @property
    def state(self) -> str:
        """``requested``, ``running``, ``done``, ``refused``, ``failed`` or ``expired``."""
        known = {
            CommandState.ISSUED: "requested",
            CommandState.ACCEPTED: "running",
            CommandState.APPLIED: "done",
        }
        state = CommandState(self.command.state)
        return known.get(state, str(state))


class DecisionRecord(models.Model):
    """What Tamiyo decided, and the exact input of ``esper.pipeline.decide`` that it decided on.

    ``snapshot`` is deflated strict JSON (:func:`esper.replay.unpack_snapshot`). It is null where
    Tamiyo sent none; ``note`` says why.
    """

    uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "dec"), editable=False
    )
    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="decisions")
    run_epoch = models.PositiveIntegerField()
    step = models.BigIntegerField()
    layer = models.CharField(max_length=MAX_NAME_LENGTH)
    # null: declined
    adaptation = models.OneToOneField(
        Adaptation, on_delete=models.CASCADE, null=True, blank=True, related_name="decision"
    )
    message = models.JSONField()  # the Proposal or Decline as it was sent, without its snapshot
    snapshot = models.BinaryField(null=True)
    note = models.CharField(max_length=500, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    objects = InProjects["DecisionRecord"]()
    visible_in = staticmethod(of_run)

    class Meta:
        ordering = ("-id",)
        indexes = (models.Index(fields=("run", "adaptation"), name="decisions_of_run"),)

    def __str__(self) -> str:
        return f"decision at step {self.step} on {self.layer}"


class Remedy(models.Model):
    """A change that a training script made to its own model, as the trainer has reported it."""

    uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "rem"), editable=False
    )
    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="remedies")
    run_epoch = models.PositiveIntegerField()
    key = models.CharField(max_length=64)  # the trainer's own name for it
    kind = models.CharField(max_length=24)  # a RemedyKind; new ones need no migration
    layer = models.CharField(max_length=MAX_NAME_LENGTH, blank=True)  # empty: the whole run
    step = models.BigIntegerField()
    details = models.JSONField(default=dict)
    pause_ms = models.FloatField(null=True, blank=True)
    digest_before = models.CharField(max_length=64, blank=True)
    digest_after = models.CharField(max_length=64, blank=True)
    exact = models.BooleanField(null=True, blank=True)  # of an undo: back to the bit
    # what it was done to, where that is known here
    adaptation = models.ForeignKey(
        Adaptation, on_delete=models.SET_NULL, null=True, blank=True, related_name="remedies"
    )
    undoes = models.OneToOneField(
        "self", on_delete=models.SET_NULL, null=True, blank=True, related_name="undone_by"
    )
    created_at = models.DateTimeField(auto_now_add=True)

    objects = InProjects["Remedy"]()
    visible_in = staticmethod(of_run)

    class Meta:
        verbose_name_plural = "remedies"
        ordering = ("-id",)
        constraints = (
            models.UniqueConstraint(fields=("run", "key"), name="one_remedy_per_run_and_key"),
        )

    def __str__(self) -> str:
        return f"{self.kind} at {self.layer or 'the whole run'}"
