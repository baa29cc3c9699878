"""Every problem code of the API with what to do about it, and the page that shows them."""

# ruff: noqa: E501
from __future__ import annotations

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

# code: (status, what it means, what to do)
PROBLEMS: dict[str, tuple[int, str, str]] = {
    "adaptation-killed": (423, "Adaptation is switched off or paused.", "Wait until an operator resumes it. Rejecting, pausing and rolling back still work."),
    "already-acknowledged": (409, "Somebody has acknowledged this violation already.", "Nothing; the answer says who."),
    "busy": (503, "The database is busy or away.", "Send the same request again, with the same Idempotency-Key."),
    "claim-held": (409, "Somebody else is looking at it.", "Wait until `claimed_until`, or ask them to release it."),
    "decision-expired": (409, "Its time is over; expiry never applies anything.", "Nothing: it will be proposed again if there is still a reason."),
    "decision-not-pending": (409, "It was decided already, or is not in a state that allows this.", "Read it again; `state` and `decided_by` say what happened."),
    "evidence-stale": (409, "The layer has changed too much since the evidence was frozen.", "Look at `evidence_now`; approve with `accept_drift: true` if you still agree."),
    "forbidden": (403, "The request was refused, for example for a missing CSRF token.", "Sign in again, or use a bearer token."),
    "gate-closed": (409, "A hard limit does not hold.", "`checks` names each limit with the observed value."),
    "graft-merged": (409, "The script has merged this graft into its host's weights.", "Undo the merge in the script, or go back to an older checkpoint."),
    "host-away": (409, "No worker of that host is up, so nothing can be started there.", "Start Esper's worker on the host, then try again."),
    "host-full": (409, "The host has as many live launches as it may have.", "Stop one, or raise ESPER_LAUNCH_LIMIT."),
    "idempotency-mismatch": (422, "This Idempotency-Key was used for another request.", "Use a new key for a new request."),
    "in-progress": (409, "The same request is being worked on.", "Ask again in a moment, with the same key."),
    "incompatible-layer": (422, "This layer cannot be grafted; `detail` says why.", "Choose another layer."),
    "insufficient-scope": (403, "The token does not have the scope for this.", "Issue a token with that scope under /me."),
    "internal": (500, "A mistake of ours; it has been written down.", "Tell us the `request_id`."),
    "invalid": (400, "Something in the request makes no sense (400, or 422 for a rule).", "`errors` points at each place."),
    "kernel-evicted": (409, "The kernel's files are not in the cache any more.", "It is built again when it is next asked for."),
    "kernel-in-use": (409, "The kernel is pinned, in use, or gone already.", "Unpin it, or wait for its adaptation to end."),
    "launch-moved": (409, "The launch is in a state that does not allow this, or somebody was first.", "Read it again; `state` says what it is."),
    "layer-busy": (409, "Another adaptation of the same layer is under way.", "Wait for its end."),
    "method-not-allowed": (405, "This resource has no such method.", "See /api/docs."),
    "no-extension-left": (409, "It was extended three times already.", "Decide, or let it expire."),
    "no-such-topic": (400, "Events are kept for `run:<uid>`, `launch:<uid>`, `inbox` and `system`.", "Name one of these."),
    "not-a-compile-worker": (409, "Only workers that compile are drained or put into quarantine.", "See `kind` of the worker."),
    "not-acceptable": (406, "The answer comes as JSON only.", "Send `Accept: application/json`."),
    "not-eligible": (403, "Your role does not allow this; `detail` says whose does.", "Ask somebody with that role."),
    "not-found": (404, "There is no such thing, or it is not yours to see.", "Check the identifier and the token."),
    "not-resumable": (409, "The recipe names no command to resume with.", "Start it anew."),
    "not-signed-in": (401, "No session and no valid token.", "Sign in, or send `Authorization: Bearer esp_…`."),
    "old-epoch": (409, "A newer trainer has taken this run over.", "Stop this trainer, or register again."),
    "payload-changed": (412, "This is not what you were shown.", "Read it again before you decide."),
    "precondition-required": (428, "If-Match (428) or Idempotency-Key (400) is missing.", "Send the ETag that you read, and a fresh key."),
    "rate-limited": (429, "Too many requests, or too many live runs.", "Wait for `Retry-After`."),
    "reason-required": (422, "This act needs a reason.", "Send `reason`."),
    "recipe-changed": (409, "The recipe's file is not the one that you were shown.", "Look at it again; the answer holds the new `digest`."),
    "recipe-unusable": (409, "The recipe's file is gone or broken.", "`detail` says what its host found; mend the file there."),
    "run-ended": (409, "The run has ended.", "Nothing can change any more."),
    "run-name-taken": (409, "Another live run of the same owner has this name.", "End that run, or choose another name."),
    "self-approval": (403, "Nobody approves an adaptation of their own run.", "Ask another operator."),
    "too-large": (413, "The body is larger than what is taken.", "Send smaller batches."),
    "too-slow": (408, "The body did not arrive in time.", "Send it again over a better line, or send smaller batches."),
    "too-many-layers": (422, "More layers than can be watched.", "Name those that matter: `esper.attach(…, slots=[…])`."),
    "unknown-blueprint": (422, "The catalogue has no such blueprint.", "See `GET /api/v1/blueprints`."),
    "unknown-layer": (422, "The run has no such layer.", "See the run's layers."),
    "unsupported-media-type": (415, "Bodies are JSON.", "Send `Content-Type: application/json`."),
    "version-changed": (412, "It has changed since you read it.", "Read it again; the ETag is its version."),
}  # fmt: skip


@login_required
def problems_page(request: HttpRequest) -> HttpResponse:
    """``/api/docs/problems``: where the ``type`` of a problem document points."""
    return render(request, "api/problems.html", {"problems": PROBLEMS})
