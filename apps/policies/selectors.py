"""Freezes: which is in effect over a run, and when the next one begins."""

from __future__ import annotations

from datetime import datetime

from django.db.models import Q, QuerySet

from apps.accounts.visibility import everything
from apps.policies.models import Freeze
from apps.rest.clock import now as database_now


def freezes() -> QuerySet[Freeze]:
    """All of them, the latest first."""
    return Freeze.objects.select_related("project", "set_by", "ended_by")


def present_freezes() -> QuerySet[Freeze]:
    """Those in effect now, and those that are to come."""
    return freezes().filter(ended_at=None, ends_at__gt=database_now())


def freeze_over(project_id: int | None) -> Freeze | None:
    """The freeze that keeps the runs of a project as they are now; the one that ends last."""
    now = database_now()
    open_now = Freeze.objects.filter(
        _over(project_id), ended_at=None, starts_at__lte=now, ends_at__gt=now
    )
    return open_now.select_related("project").order_by("-ends_at").first()


@everything()  # a command must not be valid in a freeze that its sender may not see
def next_freeze(project_id: int | None) -> datetime | None:
    """When the next freeze begins over the runs of a project: no command is valid after that.

    A trainer refuses what has expired, so that nothing is applied late in a freeze.
    """
    to_come = Freeze.objects.filter(
        _over(project_id), ended_at=None, starts_at__gt=database_now()
    ).order_by("starts_at")
    return to_come.values_list("starts_at", flat=True).first()


def _over(project_id: int | None) -> Q:
    return Q(project=None) | Q(project=project_id)
