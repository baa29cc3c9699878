"""Adaptations for people and for Tamiyo. What trainers call is in ``apps.trainers``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from django.db import transaction
from django.http import HttpResponseBase
from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.act_endpoint import act_endpoint
from apps.accounts.actors import ActorKind
from apps.accounts.authentication import actor, person, via
from apps.accounts.endpoint import Endpoint, require, run_of_token, scopes_of
from apps.accounts.policy import Act
from apps.accounts.step_up import require_recent_password
from apps.accounts.visibility import everything
from apps.adaptations import services
from apps.adaptations.models import Adaptation, DecisionRecord, Delegation
from apps.adaptations.selectors import (
    adaptations,
    decisions,
    experience_rows,
    integration_status,
    run_snapshot,
    running_test,
)
from apps.adaptations.serializers import (
    ActInput,
    AdaptationDetailOutput,
    AdaptationOutput,
    ApproveInput,
    AssignInput,
    AttestationOutput,
    BulkRejectInput,
    BulkRejectOutput,
    DecisionOutput,
    DelegationInput,
    DelegationOutput,
    DryRunOutput,
    ExperienceOutput,
    IntegrationStatusOutput,
    MoveInput,
    RejectInput,
    RemedyInput,
    ShadowInput,
    SnoozeInput,
)
from apps.rest.errors import problem_body
from apps.rest.etag import cacheable_response, versioned_response
from apps.rest.fields import message, parse
from apps.rest.filters import (
    Lookup,
    apply_filters,
    between,
    many_of,
    moment,
    number,
    of_run,
    one_of,
    searching,
    text,
    whole_number,
)
from apps.rest.idempotency import HEADER, idempotent
from apps.rest.identifiers import named
from apps.rest.middleware import request_id
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import Problem, not_found
from apps.rest.schema import documented, listing, page_of, results_of
from apps.rest.throttling import ActThrottle
from apps.runs.selectors import visible_run
from apps.runs.serializers import RunDetailOutput, run_answer
from esper.contracts import AdaptationState, AdaptationType, Risk, TokenScope, codec, protocol, wire

TAMIYO = frozenset({TokenScope.DECIDE})
FILTERS: dict[str, Lookup] = {
    "run": (of_run, text),
    "project": ("run__project__uid", text),
    "state": ("state", one_of(AdaptationState)),
    "state__in": ("state__in", many_of(AdaptationState)),
    "layer": ("layer", text),
    "blueprint": ("blueprint__slug", text),
    "adaptation_type": ("adaptation_type", one_of(AdaptationType)),
    "risk": ("risk", one_of(Risk)),
    "remedy": ("remedy", text),
    "finding": ("finding", text),
    "q": searching("layer", "blueprint__slug", "remedy", "in_words", "run__name", "uid"),
    **between(number, "confidence"),
    **between(whole_number, "proposed_step"),
    **between(moment, "created_at", "changed_at"),
}
ORDER = ("changed_at", "created_at", "proposed_step")


# --- people ---------------------------------------------------------------------------------------


class Adaptations(Endpoint):
    parameters = PARAMETERS | frozenset(FILTERS)

    @documented(
        "list_adaptations",
        answer=page_of(AdaptationOutput),
        parameters=listing(FILTERS, ORDER),
    )
    def get(self, request: Request) -> HttpResponseBase:
        rows = apply_filters(request, adaptations(), FILTERS)
        return page_response(
            request, rows, lambda rows: AdaptationOutput(rows, many=True).data, order=ORDER
        )


class AdaptationDetail(Endpoint):
    @documented("read_adaptation", answer=AdaptationDetailOutput)
    def get(self, request: Request, uid: str) -> Response:
        found = _adaptation(uid)
        return cacheable_response(request, _detail(request, found), version=found.version)


def _act(name: str, service: Callable[..., Adaptation], body: type[ActInput] = ActInput) -> Any:
    return act_endpoint(
        name,
        service,
        subject="adaptation",
        find=lambda _, uid: _adaptation(uid),
        answer=lambda request, changed: _answer(request, changed),
        output=AdaptationDetailOutput,
        body=body,
        versioned=True,
    )


ApproveAdaptation = _act("approve_adaptation", services.approve_adaptation, ApproveInput)
RejectAdaptation = _act("reject_adaptation", services.reject_adaptation, RejectInput)
AssignAdaptation = _act("assign_adaptation", services.assign_adaptation, AssignInput)
EscalateAdaptation = _act("escalate_adaptation", services.escalate_adaptation)
SnoozeAdaptation = act_endpoint(  # without a version: it changes nothing that others see
    "snooze_adaptation",
    services.snooze_adaptation,
    subject="adaptation",
    find=lambda _, uid: _adaptation(uid),
    answer=lambda request, changed: _answer(request, changed),
    output=AdaptationDetailOutput,
    body=SnoozeInput,
)
ShadowAdaptation = act_endpoint(  # without a version: it changes nothing of the adaptation
    "shadow_adaptation",
    services.ask_for_shadow,
    subject="adaptation",
    find=lambda _, uid: _adaptation(uid),
    answer=lambda request, changed: _answer(request, changed),
    output=AdaptationDetailOutput,
    body=ShadowInput,
)
ClaimAdaptation = _act("claim_adaptation", services.claim_adaptation)
ReleaseAdaptation = _act("release_adaptation", services.release_adaptation)
ExtendAdaptation = _act("extend_adaptation", services.extend_adaptation)
CancelAdaptation = _act("cancel_adaptation", services.cancel_adaptation)
RollBackAdaptation = _act("roll_back_adaptation", services.roll_back_adaptation)


class ReadDryRun(Endpoint):
    @documented(
        "dry_run_adaptation",
        answer=DryRunOutput,
        summary="What an approval would check and do now; nothing is changed",
    )
    def get(self, request: Request, uid: str) -> Response:
        return Response(DryRunOutput(services.dry_run(_adaptation(uid), person(request))).data)


class BulkReject(Endpoint):
    """Each by itself: what cannot be rejected does not keep the others."""

    throttle_classes = (ActThrottle,)

    @documented("reject_adaptations", body=BulkRejectInput, answer=BulkRejectOutput, act=True)
    @idempotent
    def post(self, request: Request) -> Response:
        given = parse(BulkRejectInput, request.data)
        results = [_rejection(request, one, given["reason"]) for one in given["adaptations"]]
        rejected = sum(1 for result in results if result["problem"] is None)
        return Response({"rejected": rejected, "results": results})


def _rejection(request: Request, one: dict[str, Any], reason: str) -> dict[str, Any]:
    try:
        with transaction.atomic():
            done = services.reject_adaptation(
                adaptation=_adaptation(one["uid"]),
                user=person(request),
                via=via(request),
                version=one["version"],
                reason=reason,
            )
    except Problem as problem:
        body = problem_body(problem, request_id(request._request))
        return {"uid": one["uid"], "status": problem.status, "state": None, "problem": body}
    return {"uid": done.uid, "status": 200, "state": done.state, "problem": None}


def _pause(name: str, *, paused: bool) -> Any:
    return act_endpoint(
        name,
        partial(services.request_adaptation_pause, paused=paused),
        subject="run",
        find=lambda request, uid: visible_run(uid, only=run_of_token(request)),
        # 202: the command is issued; the trainer acknowledges it later.
        answer=lambda request, run: Response(run_answer(person(request), run), status=202),
        output=RunDetailOutput,
        status=202,
    )


PauseAdaptation = _pause("pause_adaptation", paused=True)
ResumeAdaptation = _pause("resume_adaptation", paused=False)


MoveRun = act_endpoint(
    "move_run",
    services.move_run,
    subject="run",
    find=lambda request, uid: visible_run(uid, only=run_of_token(request)),
    answer=lambda request, run: Response(run_answer(person(request), run)),
    output=RunDetailOutput,
    body=MoveInput,
    dangerous=True,
)


class IntegrationStatus(Endpoint):
    @documented("read_integration_status", answer=IntegrationStatusOutput)
    def get(self, request: Request) -> Response:
        return Response(integration_status())


class AskForRemedy(Endpoint):
    throttle_classes = (ActThrottle,)
    writers: ClassVar = frozenset({TokenScope.ACT, TokenScope.PROPOSE})

    @documented(
        "ask_for_remedy",
        body=RemedyInput,
        answer=AdaptationDetailOutput,
        status=201,
        act=True,
        summary="Ask for a remedy of the catalogue",
    )
    @idempotent
    def post(self, request: Request, uid: str) -> Response:
        run = visible_run(uid, only=run_of_token(request))
        given = parse(RemedyInput, request.data)
        with everything():
            asked = services.ask_for_remedy(
                run=run,
                user=person(request),
                via=via(request),
                only_ask=TokenScope.ACT not in scopes_of(request),
                **given,
            )
        return _answer(request, _adaptation(asked.uid), status=201)


class Delegations(Endpoint):
    """Standing approvals of a run's remedies."""

    throttle_classes = (ActThrottle,)
    parameters = PARAMETERS

    @documented("list_delegations", answer=page_of(DelegationOutput), parameters=listing())
    def get(self, request: Request, uid: str) -> HttpResponseBase:
        run = visible_run(uid, only=run_of_token(request))
        rows = Delegation.objects.filter(run=run).select_related("run", "granted_by", "revoked_by")
        return page_response(request, rows, lambda rows: DelegationOutput(rows, many=True).data)

    @documented(
        "grant_delegation",
        body=DelegationInput,
        answer=DelegationOutput,
        status=201,
        act=True,
        summary="Approve a remedy ahead, within limits and for a time",
    )
    @idempotent
    def post(self, request: Request, uid: str) -> Response:
        require_recent_password(request)
        run = visible_run(uid, only=run_of_token(request))
        given = parse(DelegationInput, request.data)
        made = services.grant_delegation(run=run, user=person(request), via=via(request), **given)
        return Response(DelegationOutput(made).data, status=201)


def _delegation(request: Request, uid: str) -> Delegation:
    found = Delegation.objects.filter(uid=uid).select_related("run", "granted_by").first()
    if found is None:
        raise not_found("delegation")
    visible_run(found.run.uid, only=run_of_token(request))
    return found


RevokeDelegation = act_endpoint(
    "revoke_delegation",
    services.revoke_delegation,
    subject="delegation",
    find=_delegation,
    answer=lambda _, revoked: Response(DelegationOutput(revoked).data),
    output=DelegationOutput,
)


# --- Tamiyo ---------------------------------------------------------------------------------------


class Snapshot(Endpoint):
    @documented("read_snapshot", answer=protocol.Snapshot)
    def get(self, request: Request, uid: str) -> Response:
        snapshot = run_snapshot(visible_run(uid, only=run_of_token(request)))
        return Response(wire.to_wire(snapshot))


class Proposals(Endpoint):
    writers: ClassVar = TAMIYO

    @documented(
        "propose_adaptation",
        body=protocol.Proposal,
        answer=AdaptationDetailOutput,
        status=201,
        act=True,
    )
    @idempotent
    def post(self, request: Request, uid: str) -> Response:
        proposed = services.propose_adaptation(
            run=visible_run(uid, only=run_of_token(request)),
            proposal=message(request, protocol.Proposal),
            idempotency_key=request.headers[HEADER].strip(),
            actor=actor(request, ActorKind.TAMIYO),
        )
        return _answer(request, _adaptation(proposed.uid), status=201)


class Declines(Endpoint):
    writers: ClassVar = TAMIYO

    @documented("record_decline", body=protocol.Decline, answer=None, status=201)
    def post(self, request: Request, uid: str) -> Response:
        services.record_decline(
            run=visible_run(uid, only=run_of_token(request)),
            decline=message(request, protocol.Decline),
        )
        return Response({}, status=201)


class VerdictOnAdaptation(Endpoint):
    writers: ClassVar = TAMIYO

    @documented("judge_adaptation", body=protocol.Verdict, answer=AdaptationDetailOutput, act=True)
    @idempotent
    def post(self, request: Request, uid: str) -> Response:
        verdict = message(request, protocol.Verdict)
        judged = services.judge_adaptation(
            adaptation=_adaptation(uid),
            verdict=verdict.decided,
            reward_terms=verdict.reward,
            actor=actor(request, ActorKind.TAMIYO),
        )
        return _answer(request, judged)


class Decisions(Endpoint):
    parameters = PARAMETERS

    @documented(
        "list_decisions",
        answer=page_of(DecisionOutput),
        parameters=listing(),
        summary="What Tamiyo decided on a run",
    )
    def get(self, request: Request, uid: str) -> HttpResponseBase:
        rows = decisions(visible_run(uid, only=run_of_token(request)))
        return page_response(request, rows, lambda rows: DecisionOutput(rows, many=True).data)


class DecisionSnapshot(Endpoint):
    @documented(
        "read_decision_snapshot",
        answer=protocol.Snapshot,
        summary="What a decision was made on",
    )
    def get(self, request: Request, uid: str) -> Response:
        record = DecisionRecord.objects.filter(uid=uid).first()
        if record is None:
            raise not_found("recorded decision")
        return Response(wire.to_wire(services.stored_snapshot(record)))


class AdaptationSnapshot(Endpoint):
    @documented(
        "read_adaptation_snapshot",
        answer=protocol.Snapshot,
        summary="What an adaptation was decided on",
    )
    def get(self, request: Request, uid: str) -> Response:
        record = services.decision_of(_adaptation(uid))
        return Response(wire.to_wire(services.stored_snapshot(record)))


class Attestation(Endpoint):
    @documented(
        "read_attestation",
        answer=AttestationOutput,
        summary="Who decided what, signed, for a check without the server",
    )
    def get(self, request: Request, uid: str) -> Response:
        require(person(request), Act.VIEW_AUDIT)
        return Response(services.attestation_of(_adaptation(uid)))


class Experiences(Endpoint):
    @documented("list_experience", answer=results_of(ExperienceOutput))
    def get(self, request: Request) -> Response:
        return Response({"results": experience_rows()})


def _adaptation(uid: str) -> Adaptation:
    found = (
        adaptations()
        .select_related("safety_policy", "job", "kernel")
        .filter(named(uid, "A"))
        .first()
    )
    if found is None:
        raise not_found("adaptation")
    return found


def _answer(request: Request, adaptation: Adaptation, *, status: int = 200) -> Response:
    return versioned_response(_detail(request, adaptation), adaptation.version, status=status)


def _detail(request: Request, adaptation: Adaptation) -> Any:
    drift = services.evidence_drift(adaptation)
    context = {
        "evidence_now": services.evidence_now(adaptation),
        "evidence_drift": None if drift is None else codec.number_to_wire(drift),
        "shadows": services.trials_of(adaptation),
        "pause_forecast": services.pause_forecast(adaptation),
        "undo_plan": services.undo_plan(adaptation),
        "permissions": services.permissions(adaptation, person(request)),
        "votes": services.votes_of(adaptation),
        "running_test": running_test(adaptation),
    }
    return AdaptationDetailOutput(adaptation, context=context).data
