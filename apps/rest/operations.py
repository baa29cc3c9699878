"""What each operation of the API does, and the usual body of an act, for its documentation."""

# ruff: noqa: E501
from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation in words.

    Attributes:
        text: what it does, who may do it, what refuses it.
        example: the usual body of an act; None: it has none, or the protocol's types describe it.
    """

    text: str
    example: dict[str, Any] | None = None


OPERATIONS: dict[str, Operation] = {
    "acknowledge_violations": Operation("Acknowledges several findings with one note; each has its own answer.", {"violations": ["vio_01K0000000000000000000000A"], "reason": "known, being repaired"}),
    "approve_policy": Operation("Agrees with a draft (its number or v3), which is in force from the next decision. Curators and administrators, but not its author.", {"reason": "the back-test looks right"}),
    "assign_adaptation": Operation("Asks one person to decide on an adaptation; an empty name takes the request back.", {"to": "oscar", "reason": "you know this model"}),
    "escalate_adaptation": Operation("Lets an administrator approve it; everybody who may reject it still may.", {"reason": "the evidence is mixed"}),
    "read_run_policy": Operation("Returns the thresholds in force for one run (uid or R-3), and which scope each comes from."),
    "snooze_adaptation": Operation("Hides an adaptation from the caller's own inbox for some minutes; 0 ends it. Others see no difference.", {"minutes": 15}),
    "dry_run_adaptation": Operation("Says what an approval would check and do now, with every gate as it stands."),
    "acknowledge_command": Operation("The trainer answers a command: accepted, applied, refused or failed."),
    "acknowledge_violation": Operation("Says that somebody has seen it, with a note.", {"reason": "maintenance"}),
    "approve_adaptation": Operation("Approves exactly what was shown: If-Match is its version, evidence_hash its content. Refused when it was decided, has expired, has changed, or its evidence has drifted. Nobody approves an adaptation of their own run.", {"evidence_hash": "9f3c000000000000000000000000000000000000000000000000000000000000", "reason": "the layer has been flat for an hour"}),
    "ask_for_remedy": Operation("Asks for a remedy of the catalogue by hand. Where the caller may approve, it is applied; else it waits in the inbox.", {"remedy": "rewind", "config": {"step": -1}, "reason": "the loss jumped"}),
    "cancel_adaptation": Operation("Cancels an adaptation that has not been sent to the trainer yet.", {"reason": "maintenance"}),
    "claim_adaptation": Operation("Tells the others for ten minutes that somebody is looking at it. Nobody else can approve it meanwhile.", {"reason": "maintenance"}),
    "disable_blueprint": Operation("Lets nobody propose a blueprint; grafts of it that are in models stay. Curators and administrators.", {"reason": "maintenance"}),
    "drain_worker": Operation("Lets a worker finish its job and gives it no other. It needs a reason.", {"reason": "maintenance"}),
    "enable_blueprint": Operation("Lets a blueprint be proposed again. Curators and administrators.", {"reason": "maintenance"}),
    "evict_kernel": Operation("Removes a kernel's files from the cache. Refused while it is pinned or in use.", {"reason": "maintenance"}),
    "export_audit_log": Operation("Streams the log as NDJSON, oldest first, with the filters of the list."),
    "extend_adaptation": Operation("Extends the deadline by five minutes, three times at most.", {"reason": "maintenance"}),
    "finish_run": Operation("The trainer reports that its run has ended."),
    "index": Operation("Names every collection that can be read without an identifier, and the documents about this API."),
    "issue_token": Operation("Issues a token of the caller. Its secret is in this answer and nowhere else.", {"name": "laptop", "scopes": ["read", "act"], "expires_in_days": 90}),
    "judge_adaptation": Operation("Tamiyo reports the verdict on an adaptation in probation, with the terms of its reward."),
    "judge_remedy": Operation("The trainer says whether the finding that a remedy answers is over."),
    "list_adaptations": Operation("Lists grafts and remedies, newest first, by run, state, layer, blueprint, risk and text."),
    "list_audit_events": Operation("Lists who did what to which object, when, from where and why, newest first."),
    "list_blueprints": Operation("Lists the catalogue of what can be grafted."),
    "list_commands": Operation("Lists the commands to a run's trainer with their answers. Its trainer gets the signed ones that it has not answered."),
    "list_decisions": Operation("Lists what Tamiyo decided on a run, declined proposals too."),
    "list_events": Operation("Returns the events of a topic after a sequence number, so that a client fills the gap that a broken socket has left."),
    "list_experience": Operation("Returns what Tamiyo has learned of each blueprint: how often it was kept and rolled back, and its mean reward."),
    "list_frames": Operation("Returns health frames after a step: one row of signals for each layer."),
    "list_jobs": Operation("Lists compile jobs with their steps and times."),
    "list_kernels": Operation("Lists compiled kernels with their measured latency and memory."),
    "list_launches": Operation("Lists what was started from recipes, newest first."),
    "list_policies": Operation("Lists all versions of the thresholds, newest first."),
    "list_recipes": Operation("Lists what may be started on which host, with its parameters."),
    "list_remedies": Operation("Lists the catalogue of remedies with their settings."),
    "list_runs": Operation("Lists runs, newest first, by state, mode, name, owner, step and text."),
    "list_tokens": Operation("Lists the caller's own tokens, without their secrets."),
    "list_violations": Operation("Lists findings and broken limits, newest first."),
    "list_workers": Operation("Lists workers and Tamiyo as they last reported."),
    "me": Operation("Returns who the caller is and which acts they may do."),
    "pause_adaptation": Operation("Pauses adaptation of one run; training goes on. The trainer acknowledges it.", {"reason": "maintenance"}),
    "pin_kernel": Operation("Keeps a kernel from being evicted.", {"reason": "maintenance"}),
    "propose_adaptation": Operation("Tamiyo proposes an adaptation; the gates answer at once, and the policy or a person decides."),
    "propose_remedy": Operation("The trainer proposes a remedy for a finding, or asks what became of its proposal."),
    "publish_policy": Operation("Writes a version with some thresholds changed, for all runs, a project or one run. It is in force from the next decision where it is only stricter, else it is a draft for a second person. Curators and administrators; it needs a reason.", {"changes": {"probation_steps": 800}, "reason": "longer tests for small gains"}),
    "quarantine_worker": Operation("Refuses what a worker builds from now on. It needs a reason.", {"reason": "maintenance"}),
    "read_adaptation": Operation("Returns one adaptation (uid or A-17) with its evidence then and now, its checks, its undo plan and what the caller may do. The ETag is what an act sends as If-Match."),
    "read_adaptation_snapshot": Operation("Returns the exact input on which Tamiyo decided this adaptation."),
    "read_adaptation_switch": Operation("Says whether adaptation is on at all, and who switched it last."),
    "read_attestation": Operation("Returns the audit event of the decision and what was shown, signed, so that it can be checked without the server."),
    "read_audit_event": Operation("Returns one event of the audit log by its number."),
    "read_blueprint": Operation("Returns one blueprint with its revision as ETag."),
    "read_current_policy": Operation("Returns the thresholds in force."),
    "read_decision_snapshot": Operation("Returns the exact input of a recorded decision, also of one that was declined."),
    "read_heatmap": Operation("Returns one signal over layers and time, in columns."),
    "read_integration_status": Operation("Returns active adaptations, cache, execution metrics and safety violations in one answer."),
    "read_job": Operation("Returns one compile job with its steps and the end of its log."),
    "read_kernel": Operation("Returns one kernel by its digest."),
    "read_kernel_cache": Operation("Returns size, hits, misses and evictions of the cache."),
    "read_kernel_file": Operation("Returns one file of a kernel. Its name is its content, so it can be cached for ever."),
    "read_launch": Operation("Returns one launch with its state and what the caller may do."),
    "read_launch_log": Operation("Returns what a launch has printed after a byte; the server keeps the last 256 KiB."),
    "read_metric": Operation("Returns one metric in buckets of min, mean and max, so that spikes stay visible."),
    "read_policy": Operation("Returns one version of the thresholds."),
    "read_recipe": Operation("Returns one recipe with its parameters and its digest."),
    "read_remedy": Operation("Returns one remedy of the catalogue."),
    "read_run": Operation("Returns one run (uid or R-3) with its layers and what the caller may do."),
    "read_snapshot": Operation("Returns what Tamiyo decides on: layers, signals, findings, thresholds."),
    "read_token": Operation("Returns one of the caller's own tokens, without its secret."),
    "read_violation": Operation("Returns one finding or broken limit (uid or V-88)."),
    "read_worker": Operation("Returns one worker with the job that it builds."),
    "record_decline": Operation("Tamiyo records why it proposes nothing, with the input of that decision."),
    "register_run": Operation("A trainer registers its run, or the next epoch of it, and gets a token for this run alone."),
    "reject_adaptation": Operation("Rejects an adaptation that waits. It needs a reason, and works while adaptation is switched off.", {"reason": "the run ends in a minute"}),
    "reject_adaptations": Operation("Rejects several adaptations with one reason. Each is decided by itself and has its own result; one that cannot be rejected does not keep the others.", {"adaptations": [{"uid": "adp_01K0000000000000000000000A", "version": 3}], "reason": "the run ends in a minute"}),
    "release_adaptation": Operation("Gives up the caller's claim.", {"reason": "maintenance"}),
    "release_worker": Operation("Gives a worker jobs again.", {"reason": "maintenance"}),
    "report_remedy": Operation("The trainer reports what its script changed by itself."),
    "report_rollback": Operation("The trainer reports what its guard took out by itself."),
    "report_tamiyo_heartbeat": Operation("Tamiyo reports that it runs."),
    "resume_adaptation": Operation("Resumes adaptation of one run. Refused while all adaptation is killed.", {"reason": "maintenance"}),
    "resume_launch": Operation("Continues an ended launch from its checkpoint.", {"reason": "maintenance"}),
    "revoke_token": Operation("Revokes a token of the caller; it stops working at once."),
    "roll_back_adaptation": Operation("Takes an adaptation back: from probation by restoring the snapshot bit by bit, once it was kept by taking the graft out. It needs a reason.", {"reason": "the held-out loss rises"}),
    "say_hello": Operation("The trainer reports the grafts that are in its model after a start; the server settles what differs."),
    "scrub_kernel_cache": Operation("Requests a check of the digest and the signature of every kernel.", {"reason": "maintenance"}),
    "send_telemetry": Operation("The trainer sends a batch of frames, metrics and findings."),
    "set_adaptation_switch": Operation("Kills all adaptation of all runs, or allows it again. Training goes on everywhere. Operators and administrators; no reason is needed, so that nothing delays it.", {"on": False, "reason": "losses rise in three runs"}),
    "start_recipe": Operation("Starts a recipe on its host with checked parameters. `digest` is of the recipe that was shown.", {"host": "gpu-1", "recipe": "digits", "digest": "9f3c000000000000000000000000000000000000000000000000000000000000", "parameters": {"steps": 500}}),
    "stop_launch": Operation("Stops a launch: first politely, after its grace period by force.", {"reason": "maintenance"}),
    "stop_run": Operation("Tells the trainer to end the run at its next step.", {"reason": "maintenance"}),
    "unpin_kernel": Operation("Lets a kernel be evicted again.", {"reason": "maintenance"}),
    "verify_audit_log": Operation("Checks the chain of hashes and its signed heads, and names the first thing that is wrong."),
    "withdraw_policy": Operation("Gives a draft up. Curators and administrators.", {"reason": "a better one follows"}),
}  # fmt: skip
