"""Service accounts: programs such as CI, with tokens of their own, apart from the people."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from django.db import transaction
from django.utils import timezone

from apps.accounts.actors import Actor
from apps.accounts.models import ApiToken, Membership, Project, User
from apps.accounts.policy import Act, may
from apps.accounts.services import issue_token
from apps.accounts.signals import account_changed
from apps.rest.problems import Problem
from esper.contracts import Role, TokenScope


@transaction.atomic
def create_service_account(
    *,
    name: str,
    scopes: Sequence[TokenScope],
    project: Project,
    expires_at: datetime | None,
    user: User,
    via: str,
) -> tuple[ApiToken, str]:
    """An account for a program that works in one project, with its first token and its secret.

    It is a researcher of the project, so that it can register runs there, and a viewer elsewhere.

    Raises:
        Problem: not allowed, or the name is taken.
    """
    _check(user, project)
    if User.objects.filter(username=name).exists():
        raise Problem(409, "name-taken", f"There is an account {name!r} already.")
    actor = Actor.person(user, via=via)
    account = make_service_account(name=name, project=project, actor=actor)
    return issue_token(
        owner=account,
        name=name,
        scopes=list(scopes),
        project_id=project.pk,
        expires_at=expires_at,
        actor=actor,
    )


@transaction.atomic
def end_service_account(*, project: Project, name: str, user: User, via: str) -> Project:
    """Its tokens stop working at once. It is kept, because the audit log names it.

    Raises:
        Problem: not allowed, or the project has no such service account.
    """
    _check(user, project)
    account = User.objects.filter(
        username=name, is_service=True, memberships__project=project
    ).first()
    if account is None:
        raise Problem(422, "invalid", f"{project.name} has no service account called {name!r}.")
    User.objects.filter(pk=account.pk).update(is_active=False)
    account.tokens.filter(revoked_at=None).update(revoked_at=timezone.now())
    _record(account, Actor.person(user, via=via), "service_account.ended")
    return project


@transaction.atomic
def make_service_account(*, name: str, project: Project | None, actor: Actor) -> User:
    """Without a check and a token: for the command line of the host."""
    account = User(username=name, role=Role.VIEWER, is_service=True)
    account.set_unusable_password()
    account.save()
    if project is not None:
        Membership.objects.create(project=project, user=account, role=Role.RESEARCHER)
    _record(account, actor, "service_account.created")
    return account


def _check(user: User, project: Project) -> None:
    permission = may(user, Act.MANAGE_PEOPLE, of=project)
    if not permission.allowed:
        raise Problem(403, permission.code, permission.why)


def _record(account: User, actor: Actor, act: str) -> None:
    account_changed.send(
        User, actor=actor, act=act, object_kind="service_account", object_uid=account.username
    )
