"""Projects with their members and roles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.db.models import Count
from django.http import HttpRequest, HttpResponse
from django.utils.translation import gettext as _

from apps.accounts.models import Membership, Project, User
from apps.accounts.policy import Act, Permission, may
from apps.accounts.projects import projects_of
from apps.console.panels import Panel, render_page
from apps.console.request import page, person
from esper.contracts import Role


@page
def projects(request: HttpRequest) -> HttpResponse:
    user = person(request)

    def build() -> dict[str, Any]:
        may_create = may(user, Act.MANAGE_PEOPLE)
        rows = project_rows(user)
        manages = any(row.may_manage.allowed for row in rows)
        active = User.objects.filter(is_active=True, is_service=False).order_by("username")
        return {
            "rows": rows,
            "may_create": may_create,
            "people": active if manages else (),
            "roles": list(Role),
        }

    panels = [Panel("projects", _("Projects"), "console/projects/list.html", build, every=60)]
    return render_page(request, "console/simple.html", title=_("Projects"), panels=panels)


@dataclass(frozen=True, slots=True)
class ProjectRow:
    """``role``: this person's own. ``members``: people with a role of their own.
    ``services``: programs that work in it."""

    project: Project
    role: Role
    runs: int
    members: list[Membership]
    services: list[Membership]
    may_manage: Permission


def project_rows(user: User) -> list[ProjectRow]:
    """The default project first; the number of queries does not grow with the rows."""
    found = projects_of(user).annotate(run_count=Count("runs"))
    found = found.prefetch_related("members__user").order_by("pk")
    return [
        ProjectRow(
            project,
            user.access.roles[project.pk],
            project.run_count,
            project.people,
            project.services,
            may(user, Act.MANAGE_PEOPLE, of=project),
        )
        for project in found
    ]
