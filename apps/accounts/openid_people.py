"""Whom an OpenID provider's claims mean, and what they may do here."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction

from apps.accounts.actors import Actor, ActorKind
from apps.accounts.models import Identity, Membership, Project, User
from apps.accounts.openid import SignInError
from apps.accounts.sessions import end_other_sessions
from apps.accounts.signals import account_changed
from apps.rest.problems import Problem
from esper.contracts import Role

log = logging.getLogger(__name__)

PROVIDER = Actor(ActorKind.SYSTEM, "system", "provider")
_LONGEST_NAME = 64  # as the audit log names people


@transaction.atomic
def person_of(claims: dict[str, Any]) -> User:
    """Their account, with the roles that their groups have now; made at the first sign-in.

    It is found by issuer and subject. A name or a mail address finds nobody: a provider may give
    both to somebody else.

    Raises:
        SignInError: none of their groups has a role here, the account is deactivated, or another
            account has the name already.
    """
    role, projects = _admitted(claims)
    identity = (
        Identity.objects.select_related("user")
        .filter(issuer=claims["iss"], subject=claims["sub"])
        .first()
    )
    user = identity.user if identity else _create(claims, role or Role.VIEWER)
    if not user.is_active or user.is_service:
        raise SignInError(403, "deactivated", "Your account is deactivated. Ask an administrator.")
    _set_role(user, role or Role.VIEWER)
    for project, given in projects.items():
        _set_membership(project, user, given)
    user.forget_access()
    return user


def _admitted(claims: dict[str, Any]) -> tuple[Role | None, dict[Project, Role | None]]:
    """Raises ``SignInError`` where none of the groups has a role here."""
    role, projects = _rights(groups_of(claims))
    if role is None and not any(projects.values()):
        raise SignInError(
            403,
            "no-group",
            f"You have an account at {settings.ESPER_OIDC_NAME}, but none of its groups may use "
            "Esper. Ask whoever runs this server to add you to one.",
        )
    return role, projects


@dataclass(frozen=True, slots=True)
class OfferedIdentity:
    """Whom the provider has just named to a person who is signed in here.

    Attributes:
        name: as the person is called there, for them to read; it decides nothing.
        role: of the account by its groups, from the next sign-in through the provider.
    """

    issuer: str
    subject: str
    name: str
    role: str


def offered_identity(claims: dict[str, Any]) -> OfferedIdentity:
    """Raises ``SignInError`` where that account of the provider could not sign in here."""
    role, _ = _admitted(claims)
    names = (str(claims.get(claim, "")) for claim in ("preferred_username", "email", "name"))
    return OfferedIdentity(
        claims["iss"],
        claims["sub"],
        next(filter(None, names), claims["sub"])[:254],
        str(role or Role.VIEWER),
    )


def identity_of(user: User) -> Identity | None:
    """At the configured provider."""
    return Identity.objects.filter(user=user, issuer=settings.ESPER_OIDC_ISSUER).first()


@transaction.atomic
def link_identity(*, user: User, offered: OfferedIdentity, via: str) -> Identity:
    """Let the person sign in to this account through the provider too.

    The caller has made sure that the person proved who they are, here and at the provider.

    Raises:
        Problem: the account is linked already, or the other one belongs to another person (409).
    """
    if user.is_service:
        raise Problem(403, "not-eligible", "A service account does not sign in.")
    if identity_of(user) is not None:
        raise Problem(409, "linked-already", "Your account is linked already. Unlink it first.")
    try:
        with transaction.atomic():
            identity = Identity.objects.create(
                user=user, issuer=offered.issuer, subject=offered.subject
            )
    except IntegrityError as error:
        raise Problem(
            409,
            "identity-taken",
            f"That account of {settings.ESPER_OIDC_NAME} belongs to another person here.",
        ) from error
    _record(
        user,
        "person.identity_linked",
        Actor.person(user, via=via),
        issuer=offered.issuer,
        subject=offered.subject,
    )
    return identity


@transaction.atomic
def unlink_identity(*, user: User, via: str, present: str) -> None:
    """From now on the person signs in with the password alone. Other browsers are signed out.

    Args:
        present: the key of the session that stays.

    Raises:
        Problem: the account is not linked (409), or has no password to sign in with (403).
    """
    identity = identity_of(user)
    if identity is None:
        raise Problem(409, "not-linked", "Your account is not linked.")
    if not user.has_usable_password():
        raise Problem(
            403,
            "not-eligible",
            "Your account has no password, so you could not sign in any more. An administrator "
            "can give it one.",
        )
    identity.delete()
    _record(
        user,
        "person.identity_unlinked",
        Actor.person(user, via=via),
        issuer=identity.issuer,
        subject=identity.subject,
    )
    end_other_sessions(user=user, via=via, present=present)


def groups_of(claims: dict[str, Any]) -> frozenset[str]:
    """What the configured claim holds; ``realm_access.roles`` goes into an object.

    A mail address counts as a group only where the provider has verified it.
    """
    name = settings.ESPER_OIDC_GROUPS_CLAIM
    if name == "email" and claims.get("email_verified") is not True:
        return frozenset()
    found: Any = claims.get(name)
    if found is None:
        found = claims
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
    listed = found if isinstance(found, list) else [found]
    return frozenset(one for one in listed if isinstance(one, str) and one)


def _rights(groups: frozenset[str]) -> tuple[Role | None, dict[Project, Role | None]]:
    """The role of the account, and in each project that the setting names. The first line counts
    that names one of the groups."""
    names = {rule.project for rule in settings.ESPER_OIDC_ROLES if rule.project}
    known = {project.name: project for project in Project.objects.filter(name__in=names)}
    for missing in names - set(known):
        log.warning("ESPER_OIDC_ROLES names the project %r, which does not exist", missing)
    role: Role | None = None
    projects: dict[Project, Role | None] = dict.fromkeys(known.values())
    for rule in settings.ESPER_OIDC_ROLES:
        if rule.group not in groups:
            continue
        if not rule.project:
            role = role or rule.role
        elif rule.project in known:
            project = known[rule.project]
            projects[project] = projects[project] or rule.role
    return role, projects


def _create(claims: dict[str, Any], role: Role) -> User:
    name = _name_of(claims)
    if User.objects.filter(username__iexact=name).exists():
        raise SignInError(
            403,
            "name-taken",
            f"There is an account {name!r} here already. If it is yours, sign in with its password "
            "and link it on the page Account and settings. Otherwise an administrator can rename "
            "it; then sign in again.",
        )
    user = User(username=name, role=role)
    if claims.get("email_verified") is True:
        user.email = str(claims.get("email", ""))[:254]
    user.set_unusable_password()
    user.save()
    Identity.objects.create(user=user, issuer=claims["iss"], subject=claims["sub"])
    _record(user, "person.created", role=str(role), subject=claims["sub"])
    return user


def _name_of(claims: dict[str, Any]) -> str:
    """How the person is called here; the subject where nothing else can be a name."""
    for claim in ("preferred_username", "email", "sub"):
        name = str(claims.get(claim, "")).strip()[:_LONGEST_NAME]
        try:
            User.username_validator(name)
        except ValidationError:
            continue
        return name
    raise SignInError(
        403, "sign-in-refused", "Your account there has no name that can be used here."
    )


def _set_role(user: User, role: Role) -> None:
    if user.role != role:
        if _is_last_admin(user):
            _record(user, "person.role_kept", role=str(user.role), by_groups=str(role))
            return
        before, user.role = user.role, role
        user.save()
        _record(user, "person.role_set", role=str(role), before=str(before))


def _is_last_admin(user: User) -> bool:
    """Without this account nobody could administer the server while the provider is away.

    Only accounts with a password count: the others have their role from the provider. The rows are
    locked, so that of two last ones at once not both lose it.
    """
    if user.role != Role.ADMIN or not user.has_usable_password():
        return False
    admins = User.objects.select_for_update().filter(
        role=Role.ADMIN, is_active=True, is_service=False
    )
    return not any(one.has_usable_password() for one in admins if one.pk != user.pk)


def _set_membership(project: Project, user: User, role: Role | None) -> None:
    """Also ends one: who has left the group has left the project."""
    present = Membership.objects.filter(project=project, user=user).first()
    if (present.role if present else None) == role:
        return
    if role is None:
        Membership.objects.filter(project=project, user=user).delete()
    else:
        Membership.objects.update_or_create(project=project, user=user, defaults={"role": role})
    account_changed.send(
        Project,
        actor=PROVIDER,
        act="project.member_set" if role else "project.member_removed",
        object_kind="project",
        object_uid=project.uid,
        data={"username": user.get_username(), "role": str(role or ""), "person": user.pk},
    )


def _record(user: User, act: str, actor: Actor = PROVIDER, **data: object) -> None:
    account_changed.send(
        User,
        actor=actor,
        act=act,
        object_kind="person",
        object_uid=user.get_username(),
        data=data,
    )
