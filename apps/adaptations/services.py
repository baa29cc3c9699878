"""All that other apps may do with adaptations."""

from apps.adaptations.acts import (
    approve_adaptation,
    cancel_adaptation,
    claim_adaptation,
    extend_adaptation,
    permissions,
    reject_adaptation,
    release_adaptation,
    roll_back_adaptation,
    undo_plan,
)
from apps.adaptations.attestations import attestation_of, find_adaptation
from apps.adaptations.compile_jobs import compile_kernel
from apps.adaptations.deadlines import sweep
from apps.adaptations.decisions import (
    decision_of,
    describe,
    find_decision,
    replay_decision,
    stored_snapshot,
)
from apps.adaptations.delegations import (
    grant_delegation,
    may_grant,
    multiplies,
    open_delegations,
    revoke_delegation,
    why_not_delegated,
)
from apps.adaptations.dispatch import dispatch_adaptation, stage_kernel
from apps.adaptations.dry_runs import DryRun, dry_run
from apps.adaptations.earnings import pay_later_looks
from apps.adaptations.editing import editable_settings
from apps.adaptations.evidence import evidence_drift, evidence_now, pause_forecast
from apps.adaptations.handing_over import (
    approvers_of,
    assign_adaptation,
    escalate_adaptation,
    snooze_adaptation,
    snoozed_until,
)
from apps.adaptations.moving import move_run
from apps.adaptations.outcomes import (
    adaptation_of,
    close_open_adaptations,
    follow_answer,
    inherited,
    mark_taken_out,
    quarantine,
)
from apps.adaptations.plan_progress import advance_plan, advance_plans
from apps.adaptations.plan_proposals import propose_plan
from apps.adaptations.plans import (
    approve_plan,
    members_of,
    plan_permissions,
    plan_risk,
    plan_undo_text,
    reject_plan,
    take_back_plan,
)
from apps.adaptations.proposals import (
    GateClosedError,
    propose_adaptation,
    record_decline,
)
from apps.adaptations.reconciliation import (
    note_merged,
    put_in_doubt,
    reconcile_grafts,
    reconcile_remedies,
    withdraw_proposals,
)
from apps.adaptations.remedy_proposals import ask_for_remedy, propose_remedy, withdraw_answered
from apps.adaptations.remedy_verdicts import judge_remedy
from apps.adaptations.restoring import (
    Restored,
    note_lost_commands,
    note_replaced_key,
    note_restored,
)
from apps.adaptations.shadows import ask_for_shadow, may_shadow, trials_of
from apps.adaptations.switching import (
    request_adaptation_pause,
    set_adaptation_switch,
    set_project_switch,
)
from apps.adaptations.variants import (
    admit_variant,
    advantages,
    cases_of,
    may_admit,
    may_withdraw,
    suggest_variant,
    tried_sizes,
    variants_of,
    waiting_variants,
    withdraw_variant,
)
from apps.adaptations.variants import trials_of as trials_of_variant
from apps.adaptations.verdicts import judge_adaptation
from apps.adaptations.votes import votes_of

__all__ = [
    "DryRun",
    "GateClosedError",
    "Restored",
    "adaptation_of",
    "admit_variant",
    "advance_plan",
    "advance_plans",
    "advantages",
    "approve_adaptation",
    "approve_plan",
    "approvers_of",
    "ask_for_remedy",
    "ask_for_shadow",
    "assign_adaptation",
    "attestation_of",
    "cancel_adaptation",
    "cases_of",
    "claim_adaptation",
    "close_open_adaptations",
    "compile_kernel",
    "decision_of",
    "describe",
    "dispatch_adaptation",
    "dry_run",
    "editable_settings",
    "escalate_adaptation",
    "evidence_drift",
    "evidence_now",
    "extend_adaptation",
    "find_adaptation",
    "find_decision",
    "follow_answer",
    "grant_delegation",
    "inherited",
    "judge_adaptation",
    "judge_remedy",
    "mark_taken_out",
    "may_admit",
    "may_grant",
    "may_shadow",
    "may_withdraw",
    "members_of",
    "move_run",
    "multiplies",
    "note_lost_commands",
    "note_merged",
    "note_replaced_key",
    "note_restored",
    "open_delegations",
    "pause_forecast",
    "pay_later_looks",
    "permissions",
    "plan_permissions",
    "plan_risk",
    "plan_undo_text",
    "propose_adaptation",
    "propose_plan",
    "propose_remedy",
    "put_in_doubt",
    "quarantine",
    "reconcile_grafts",
    "reconcile_remedies",
    "record_decline",
    "reject_adaptation",
    "reject_plan",
    "release_adaptation",
    "replay_decision",
    "request_adaptation_pause",
    "revoke_delegation",
    "roll_back_adaptation",
    "set_adaptation_switch",
    "set_project_switch",
    "snooze_adaptation",
    "snoozed_until",
    "stage_kernel",
    "stored_snapshot",
    "suggest_variant",
    "sweep",
    "take_back_plan",
    "trials_of",
    "trials_of_variant",
    "tried_sizes",
    "undo_plan",
    "variants_of",
    "votes_of",
    "waiting_variants",
    "why_not_delegated",
    "withdraw_answered",
    "withdraw_proposals",
    "withdraw_variant",
]
