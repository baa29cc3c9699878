"""Projects: who is a member, with which role, and what a change of that ends."""

from __future__ import annotations

from collections.abc import Collection

from django.db import transaction
from django.db.models import OuterRef, Q, QuerySet, Subquery

from apps.accounts.actors import Actor
from apps.accounts.models import DEFAULT_PROJECT, Membership, Project, User
from apps.accounts.policy import Act, may
from apps.accounts.signals import account_changed
from apps.rest.problems import Problem
from esper.contracts import Role


def people_with(roles: Collection[Role], project_id: int | None) -> QuerySet[User]:
    """Active people who have one of these roles in a project; see ``access_of``."""
    own = Membership.objects.filter(project=project_id, user=OuterRef("pk")).values("role")[:1]
    found = Q(role_here__in=roles) & ~Q(role=Role.ADMIN)
    if project_id == DEFAULT_PROJECT:
        found |= Q(role_here=None, role__in=roles)
    if Role.ADMIN in roles:
        found |= Q(role=Role.ADMIN)
    people = User.objects.filter(is_active=True, is_service=False)
    return people.annotate(role_here=Subquery(own)).filter(found)


def projects_of(user: User) -> QuerySet[Project]:
    """Those that this person sees."""
    return Project.objects.filter(pk__in=user.access.roles)


@transaction.atomic
def create_project(*, name: str, user: User, via: str) -> Project:
    """A new project; whoever makes it is an admin of the server, and needs no membership.

    Raises:
        Problem: not allowed, or the name is taken.
    """
    _check(user, None)
    if Project.objects.filter(name=name).exists():
        raise Problem(409, "name-taken", f"There is a project {name!r} already.")
    project = Project.objects.create(name=name)
    _record(project, user, via, "project.created", name=name)
    return project


@transaction.atomic
def set_member(*, project: Project, user: User, via: str, username: str, role: str) -> Project:
    """Make a person a member, or give a member another role; no role: a member no longer.

    Raises:
        Problem: not allowed, no such account, or the person is no member.
    """
    _check(user, project)
    people = User.objects.filter(is_active=True, is_service=False)
    person = people.filter(username=username).first()
    if person is None:
        raise Problem(422, "invalid", f"There is no active account called {username!r}.")
    if role:
        Membership.objects.update_or_create(project=project, user=person, defaults={"role": role})
    elif not Membership.objects.filter(project=project, user=person).delete()[0]:
        raise Problem(422, "invalid", f"{username} is no member of {project.name}.")
    act = "project.member_set" if role else "project.member_removed"
    _record(project, user, via, act, username=username, role=role, person=person.pk)
    return project


def _check(user: User, project: Project | None) -> None:
    permission = may(user, Act.MANAGE_PEOPLE, of=project)
    if not permission.allowed:
        raise Problem(403, permission.code, permission.why)


def _record(project: Project, user: User, via: str, act: str, **data: object) -> None:
    account_changed.send(
        Project,
        actor=Actor.person(user, via=via),
        act=act,
        object_kind="project",
        object_uid=project.uid,
        data=data,
    )
