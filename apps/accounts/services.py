"""Tokens, and the demo's people."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime, timedelta

from django.db import OperationalError, transaction
from django.db.models import Q
from django.utils import timezone

from apps.accounts.actors import Actor
from apps.accounts.models import ApiToken, User, has_one_project
from apps.accounts.signals import account_changed
from esper.contracts import Role, TokenScope

_LAST_USED_RESOLUTION = timedelta(minutes=1)


@transaction.atomic
def issue_token(
    *,
    owner: User,
    name: str,
    scopes: list[TokenScope],
    run_uid: str = "",
    project_id: int | None = None,
    expires_at: datetime | None = None,
    actor: Actor | None = None,
) -> tuple[ApiToken, str]:
    """A new token and its secret, which is returned once and stored nowhere."""
    secret = f"esp_{secrets.token_urlsafe(32)}"
    token = ApiToken.objects.create(
        owner=owner,
        name=name,
        prefix=secret[:10],
        digest=_digest(secret),
        scopes=[str(scope) for scope in scopes],
        run_uid=run_uid,
        project_id=project_id,
        expires_at=expires_at,
    )
    account_changed.send(
        ApiToken,
        actor=actor or Actor.person(owner),
        act="token.issued",
        object_kind="token",
        object_uid=token.uid,
        run_uid=run_uid,
        data={"name": name, "scopes": token.scopes, "prefix": token.prefix},
    )
    return token, secret


def authenticate_token(secret: str) -> ApiToken | None:
    """The valid token with this secret, or None."""
    now = timezone.now()
    token = (
        ApiToken.objects.select_related("owner")
        .annotate(only_default=has_one_project("owner"))
        .filter(Q(expires_at=None) | Q(expires_at__gt=now))
        .filter(digest=_digest(secret), revoked_at=None, owner__is_active=True)
        .first()
    )
    if token is not None:
        token.owner.has_one_project = token.only_default
    if token and (token.last_used_at is None or now - token.last_used_at > _LAST_USED_RESOLUTION):
        # A database that takes no write at the moment is no reason to refuse a reader.
        with suppress(OperationalError):
            ApiToken.objects.filter(pk=token.pk).update(last_used_at=now)
    return token


def projects_of_tokens(ids: Collection[int]) -> dict[int, int | None]:
    """The project that each of these tokens is bound to; without those that are refused now."""
    if not ids:
        return {}
    valid = Q(expires_at=None) | Q(expires_at__gt=timezone.now())
    tokens = ApiToken.objects.filter(valid, pk__in=ids, revoked_at=None)
    return dict(tokens.values_list("pk", "project"))


@transaction.atomic
def revoke_token(*, token: ApiToken, actor: Actor) -> None:
    """Revoke a token; it is refused from now on."""
    if ApiToken.objects.filter(pk=token.pk, revoked_at=None).update(revoked_at=timezone.now()):
        account_changed.send(
            ApiToken, actor=actor, act="token.revoked", object_kind="token", object_uid=token.uid
        )


@transaction.atomic
def create_person(*, username: str, role: Role, actor: Actor) -> str:
    """A new account with a random password, which is returned once and stored nowhere."""
    password = secrets.token_urlsafe(12)
    User.objects.create_user(username=username, password=password, role=role)
    account_changed.send(
        User,
        actor=actor,
        act="person.created",
        object_kind="person",
        object_uid=username,
        data={"role": str(role)},
    )
    return password


def _digest(secret: str) -> str:
    # 256 random bits need no slow hash.
    return hashlib.sha256(secret.encode()).hexdigest()
