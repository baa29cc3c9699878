"""Every problem code of the API, what to do about it, and the page that lists them."""

# ruff: noqa: E501
from __future__ import annotations

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

# code: (status, what it means, what to do)
PROBLEMS: dict[str, tuple[int, str, str]] = {
    "adaptation-killed": (423, "Adaptation is switched off or paused.", "Wait until an operator resumes it. Rejecting, pausing and rolling back still work."),
    "already-escalated": (409, "The decision is escalated already.", "Nothing: an admin approves it, or anybody on duty rejects it."),
    "already-voted": (409, "You have approved this already; another person must approve it too.", "Wait, or ask somebody who may approve."),
    "already-acknowledged": (409, "This violation is already acknowledged.", "Nothing; the answer says by whom."),
    "busy": (503, "The database is busy or unreachable.", "Send the same request again, with the same Idempotency-Key."),
    "claim-held": (409, "Another operator has claimed this decision.", "Wait until `claimed_until`, or ask the operator to release it."),
    "decision-expired": (409, "The decision's deadline has passed. An expired decision is never applied.", "Nothing: Tamiyo proposes it again while there is a reason."),
    "decision-not-pending": (409, "The adaptation is already decided, or its state does not allow this act.", "Read it again; `state` and `decided_by` say what happened."),
    "escalated": (403, "The decision was escalated, so an admin approves it.", "Ask an admin; you may still reject it."),
    "evidence-stale": (409, "The layer has changed too much since the evidence was recorded.", "Compare with `evidence_now`; approve with `accept_drift: true` if you still agree."),
    "forbidden": (403, "The request was refused, for example because its CSRF token is missing.", "Sign in again, or use a bearer token."),
    "freeze": (409, "A freeze is in effect, in which nothing is applied.", "Wait until `until`, or ask a curator to end the freeze. Rejecting, pausing and rolling back still work."),
    "freeze-over": (409, "The freeze is over already.", "Nothing: `GET /api/v1/freezes` says by whom it was ended."),
    "gate-closed": (409, "A hard limit is exceeded.", "`checks` names each limit with the observed value."),
    "graft-merged": (409, "The script has merged this graft into its host's weights.", "Undo the merge in the script, or go back to an older checkpoint."),
    "host-away": (409, "No worker of that host is running, so nothing can be started there.", "Start Esper's worker on the host, then try again."),
    "host-full": (409, "The host has reached its limit of live launches.", "Stop a launch, or raise ESPER_LAUNCH_LIMIT."),
    "identity-taken": (409, "Another account here is linked with this account at the provider.", "Unlink it there first, or use another account at the provider."),
    "idempotency-mismatch": (422, "This Idempotency-Key was used for a different request.", "Use a new key for a new request."),
    "in-progress": (409, "A request with the same Idempotency-Key is still in progress.", "Send it again in a moment, with the same key."),
    "incompatible-layer": (422, "This layer cannot be grafted; `detail` says why.", "Choose another layer."),
    "insufficient-scope": (403, "The token does not have the scope for this request.", "Issue a token with that scope under /me."),
    "internal": (500, "The server failed with an unexpected error; it is in the server's log.", "Report the `request_id`."),
    "invalid": (400, "The request is malformed (400), or breaks a rule (422).", "`errors` points at each place."),
    "kernel-evicted": (409, "The kernel's files are no longer in the cache.", "Nothing: the kernel is built again when it is needed."),
    "kernel-in-use": (409, "The kernel is pinned, in use, or already evicted.", "Unpin it, or wait until its adaptation has ended."),
    "launch-moved": (409, "The state of the launch does not allow this, or somebody else changed it first.", "Read it again; `state` says what it is."),
    "linked-already": (409, "Your account is linked with an account at the provider already.", "Unlink it first."),
    "layer-busy": (409, "Another adaptation of the same layer is in progress.", "Wait until it has ended."),
    "no-shadow": (409, "Only grafts are tried in shadow.", "Decide without a trial."),
    "shadow-running": (409, "A trial in shadow of this adaptation is under way.", "Wait for its result."),
    "not-tried": (409, "Only a variant that was tried in shadow is admitted.", "Try it in shadow on the page of a decision on its blueprint."),
    "variant-decided": (409, "The variant is admitted or withdrawn already.", "Read it again; `decided_by` says by whom."),
    "variant-known": (409, "The variant was suggested before, or another one of its blueprint waits.", "Nothing: it is suggested once."),
    "variant-not-admitted": (409, "The size is that of a variant that no curator has admitted, or that was withdrawn.", "Reject the adaptation; Tamiyo proposes again."),
    "part-of-plan": (409, "The adaptation is part of a plan, which is decided on as a whole.", "Act on the plan; the answer names it."),
    "plan-conflict": (422, "Two changes of the plan exclude each other.", "Propose a plan without one of them."),
    "plan-too-large": (409, "The policy allows fewer changes in one plan.", "Propose fewer, or raise max_plan_changes."),
    "method-not-allowed": (405, "This resource does not have this method.", "See /api/docs."),
    "no-extension-left": (409, "The deadline was already extended three times.", "Decide, or let it expire."),
    "no-such-topic": (400, "Events are kept for `run:<uid>`, `launch:<uid>`, `inbox` and `system`.", "Name one of these topics."),
    "not-a-compile-worker": (409, "Only compile workers can be drained or put into quarantine.", "See `kind` of the worker."),
    "not-acceptable": (406, "The API answers in JSON only.", "Send `Accept: application/json`."),
    "not-delegable": (422, "The policy asks a person for this remedy each time.", "Decide it in the inbox when it is proposed."),
    "name-taken": (409, "Another one has this name already.", "Choose another name."),
    "service-account": (403, "A service account may not do this.", "Let a person do it: programs ask, and people decide."),
    "run-live": (409, "The run has not ended.", "Wait until it has ended, or end it."),
    "not-a-member": (403, "You have no role in this project.", "Ask an administrator of the project to make you a member."),
    "not-eligible": (403, "Your role does not allow this act; `detail` says whose does.", "Ask somebody with that role."),
    "not-linked": (409, "Your account is not linked with an account at a provider.", "Nothing."),
    "not-found": (404, "The resource does not exist, or you may not see it.", "Check the identifier and the token."),
    "no-stored-state": (409, "No state of the run is stored on its host.", "Ask for the remedy `checkpoint_now`, or wait until the script has written a checkpoint."),
    "not-a-recipe-run": (409, "The run was not started from a recipe.", "Start the script yourself, from a checkpoint."),
    "not-branchable": (409, "The recipe has no `branch_argv`.", "Write one; see the page on recipes in the documentation."),
    "not-resumable": (409, "The recipe names no command to resume with.", "Start the recipe again."),
    "not-signed-in": (401, "There is no session and no valid token.", "Sign in, or send `Authorization: Bearer esp_…`."),
    "run-restored": (409, "The database was restored from a backup, or a key was replaced: the registration is void.", "Register the run again, with `continues`; Esper's trainers do so by themselves."),
    "old-epoch": (409, "A newer trainer has registered for this run.", "Stop this trainer, or register again. Reject an adaptation that was proposed to the former one."),
    "password-needed": (403, "The browser's person has not given the password in the last ten minutes.", "Give it on the page, or use a token."),
    "second-factor-needed": (403, "The person has an authenticator app, or must have one, and this browser has given no code of it.", "Sign in again with a code, or set the app up on the page Account and settings."),
    "payload-changed": (412, "The decision is not the one that you were shown.", "Read it again before you decide."),
    "precondition-required": (428, "If-Match (428) or Idempotency-Key (400) is missing.", "Send the ETag that you have read, and a new key."),
    "quorum-unreachable": (422, "Not enough people may approve this.", "Give more accounts the role, or change the policy."),
    "rate-limited": (429, "Too many requests, or too many live runs.", "Wait for the seconds in `Retry-After`."),
    "reason-required": (422, "This act needs a reason.", "Send `reason`."),
    "recipe-changed": (409, "The recipe's file has changed since you were shown it.", "Read it again; the answer holds the new `digest`."),
    "recipe-unusable": (409, "The recipe's file is missing or invalid.", "`detail` says what its host found; correct the file there."),
    "run-ended": (409, "The run has ended.", "Nothing: an ended run cannot be changed."),
    "run-name-taken": (409, "Another live run of the same owner has this name.", "End that run, or choose another name."),
    "self-approval": (403, "Nobody may approve an adaptation of their own run.", "Ask another operator."),
    "state-gone": (409, "The stored state does not exist any more.", "Choose another; `states` names them, the newest first."),
    "stale": (409, "A newer version came into force meanwhile.", "Read it, and write a new draft."),
    "too-large": (413, "The body is larger than the limit.", "Send smaller batches."),
    "too-slow": (408, "The body did not arrive in time.", "Send it again over a faster connection, or send smaller batches."),
    "too-many-layers": (422, "The model has more layers than can be watched.", "Name the important ones: `esper.attach(…, slots=[…])`."),
    "unknown-blueprint": (422, "The catalogue has no such blueprint.", "See `GET /api/v1/blueprints`."),
    "unknown-remedy": (422, "The catalogue has no such remedy.", "See `GET /api/v1/remedies`."),
    "unknown-layer": (422, "The run has no such layer.", "See the run's layers."),
    "unsupported-media-type": (415, "Bodies are JSON.", "Send `Content-Type: application/json`."),
    "version-changed": (412, "The resource has changed since you read it.", "Read it again; the ETag is its version."),
}  # fmt: skip


@login_required
def problems_page(request: HttpRequest) -> HttpResponse:
    """``/api/docs/problems``: where the ``type`` of a problem document points."""
    problems = {
        code: (status, _with_code(meaning), _with_code(advice))
        for code, (status, meaning, advice) in PROBLEMS.items()
    }
    return render(request, "rest/problem_codes.html", {"problems": problems})


def _with_code(text: str) -> SafeString:
    """What stands between backticks, as code."""
    parts = enumerate(text.split("`"))
    return format_html_join(
        "",
        "{}",
        ((format_html("<code>{}</code>", part) if at % 2 else part,) for at, part in parts),
    )
