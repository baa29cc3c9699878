"""Identifies the caller: a bearer token, or a browser's session with its CSRF token."""

from __future__ import annotations

from rest_framework import authentication, exceptions
from rest_framework.request import Request

from apps.accounts.actors import Actor, ActorKind
from apps.accounts.models import ApiToken, User
from apps.accounts.services import authenticate_token

KEYWORD = "Bearer"


def bearer_secret(header: str) -> str | None:
    """The secret in an ``Authorization`` header, None where there is no bearer token."""
    keyword, _, secret = header.partition(" ")
    return secret.strip() if keyword.lower() == KEYWORD.lower() and secret.strip() else None


class TokenAuthentication(authentication.BaseAuthentication):
    """``Authorization: Bearer esp_…``; ``request.auth`` is the token."""

    def authenticate(self, request: Request) -> tuple[User, ApiToken] | None:
        header = request.META.get("HTTP_AUTHORIZATION", "")
        if not header:
            return None
        secret = bearer_secret(header)
        token = authenticate_token(secret) if secret else None
        if token is None:
            raise exceptions.AuthenticationFailed(
                "The token is unknown, expired or revoked. Issue a new one."
            )
        token.owner.bound_to = token.project_id
        return token.owner, token

    def authenticate_header(self, request: Request) -> str:
        return f'{KEYWORD} realm="esper"'


class SessionAuthentication(authentication.SessionAuthentication):
    """A signed-in browser; writing needs ``X-CSRFToken``."""


def via(request: Request) -> str:
    """How the caller has signed in, for the audit log."""
    return f"token {request.auth.prefix}…" if isinstance(request.auth, ApiToken) else "session"


def person(request: Request) -> User:
    """The signed-in user; the permissions are checked before a view runs."""
    assert isinstance(request.user, User)
    return request.user


def actor(request: Request, kind: ActorKind = ActorKind.PERSON) -> Actor:
    """The actor for the audit log."""
    return Actor(kind, person(request).get_username(), via(request))
