from __future__ import annotations

from datetime import datetime, timedelta

from django.http import HttpResponseBase
from django.utils import timezone
from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.authentication import actor, person, via
from apps.accounts.endpoint import Endpoint, scopes_of
from apps.accounts.models import ApiToken
from apps.accounts.policy import Act, may
from apps.accounts.projects import projects_of
from apps.accounts.serializers import (
    EndedOutput,
    MeOutput,
    NewTokenOutput,
    SessionOutput,
    TokenInput,
    TokenOutput,
)
from apps.accounts.services import issue_token, revoke_token
from apps.accounts.sessions import end_other_sessions, sessions_of
from apps.accounts.step_up import require_recent_password
from apps.rest.etag import cacheable_response
from apps.rest.fields import ReasonInput, parse
from apps.rest.idempotency import idempotent
from apps.rest.index import IndexOutput, readable_paths
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import not_found
from apps.rest.schema import documented, listing, page_of, results_of
from apps.rest.throttling import ActThrottle, TokenThrottle
from esper.contracts import TokenScope


class Me(Endpoint):
    @documented("me", answer=MeOutput, summary="Who I am, and what I may do")
    def get(self, request: Request) -> Response:
        user = person(request)
        acts = [str(act) for act in Act if may(user, act).allowed]
        token = request.auth if isinstance(request.auth, ApiToken) else None
        scopes = sorted(scopes_of(request))
        return Response(
            MeOutput(user, context={"may": acts, "token": token, "scopes": scopes}).data
        )


class Index(Endpoint):
    @documented("index", answer=IndexOutput, summary="Where everything is")
    def get(self, request: Request) -> Response:
        address = request.build_absolute_uri
        here = request.path
        return Response(
            {
                "version": "v1",
                "collections": {path: address(f"{here}{path}") for path in readable_paths()},
                "schema": address("/api/schema"),
                "docs": address("/api/docs"),
                "problems": address("/api/docs/problems"),
            }
        )


def session_key(request: Request) -> str:
    """Of the browser that asks; empty for a token."""
    return "" if isinstance(request.auth, ApiToken) else request._request.session.session_key or ""


class Sessions(Endpoint):
    @documented("list_sessions", answer=results_of(SessionOutput), summary="Where I am signed in")
    def get(self, request: Request) -> Response:
        rows = sessions_of(person(request), present=session_key(request))
        return Response({"results": SessionOutput(rows, many=True).data})


class EndOtherSessions(Endpoint):
    throttle_classes = (ActThrottle,)

    @documented(
        "end_other_sessions",
        body=ReasonInput,
        answer=EndedOutput,
        act=True,
        summary="Sign me out everywhere but in this browser",
    )
    @idempotent
    def post(self, request: Request) -> Response:
        ended = end_other_sessions(
            user=person(request),
            via=via(request),
            present=session_key(request),
            reason=parse(ReasonInput, request.data)["reason"],
        )
        return Response({"ended": ended})


class Tokens(Endpoint):
    throttle_classes = (TokenThrottle,)
    parameters = PARAMETERS

    @documented("list_tokens", answer=page_of(TokenOutput), parameters=listing())
    def get(self, request: Request) -> HttpResponseBase:
        """The caller's own tokens, without their secrets."""
        tokens = ApiToken.objects.filter(owner=person(request)).select_related("project")
        return page_response(request, tokens, lambda rows: TokenOutput(rows, many=True).data)

    @documented("issue_token", body=TokenInput, answer=NewTokenOutput, status=201, act=True)
    @idempotent
    def post(self, request: Request) -> Response:
        require_recent_password(request)
        given = parse(TokenInput, request.data)
        token, secret = issue_token(
            owner=person(request),
            name=given["name"],
            scopes=[TokenScope(scope) for scope in given["scopes"]],
            project_id=_project(request, given["project"]),
            expires_at=_expiry(request, timedelta(days=given["expires_in_days"])),
            actor=actor(request),
        )
        return Response(NewTokenOutput(token, context={"secret": secret}).data, status=201)


def _expiry(request: Request, wanted: timedelta) -> datetime:
    """A token that was issued with a token ends with it: a stolen one must not prolong itself."""
    asked = timezone.now() + wanted
    issuer = request.auth.expires_at if isinstance(request.auth, ApiToken) else None
    return asked if issuer is None else min(asked, issuer)


def _project(request: Request, uid: str) -> int | None:
    """To which project a new token is bound; one that a bound token issues is bound to the same."""
    bound_to = person(request).bound_to
    if not uid:
        return bound_to
    found = projects_of(person(request)).filter(uid=uid).first()
    if found is None:
        raise not_found("project")
    return found.pk


class Token(Endpoint):
    @documented("read_token", answer=TokenOutput)
    def get(self, request: Request, uid: str) -> Response:
        return cacheable_response(request, TokenOutput(_token(request, uid)).data)

    @documented("revoke_token", answer=None, status=204)
    def delete(self, request: Request, uid: str) -> Response:
        revoke_token(token=_token(request, uid), actor=actor(request))
        return Response(status=204)


def _token(request: Request, uid: str) -> ApiToken:
    """One of the caller's own."""
    token = ApiToken.objects.filter(owner=person(request), uid=uid).first()
    if token is None:
        raise not_found("token")
    return token
