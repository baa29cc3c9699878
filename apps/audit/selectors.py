"""The audit log by what people look for. Page, API and export share these filters."""

from __future__ import annotations

from django.db.models import Q

from apps.accounts.visibility import runs_in_project
from apps.audit.models import AuditEvent
from apps.rest.filters import Lookup, moment, searching, text, whole_number


def events_of_run(name: str) -> Q:
    """By the run's uid or its name, which its registrations hold."""
    named = AuditEvent.objects.filter(
        act__in=("run.registered", "run.resumed"), data__name=name
    ).order_by()
    return Q(run_uid=name) | Q(run_uid__in=named.values("run_uid"))


def objects_called(name: str) -> Q:
    """By the object's uid, or an adaptation's number for people (A-17)."""
    digits = name.upper().removeprefix("A-")
    if digits != name and digits.isascii() and digits.isdigit() and len(digits) < 19:
        return Q(object_kind="adaptation", data__number=int(digits))
    return Q(object_uid=name)


def events_of_project(uid: str) -> Q:
    """Of the project itself, and of its runs as they are placed now."""
    runs = runs_in_project(uid)
    return Q(object_kind="project", object_uid=uid) | Q(run_uid__in=runs.values("uid"))


FILTERS: dict[str, Lookup] = {
    "run": (events_of_run, text),
    "project": (events_of_project, text),
    "actor": ("actor__icontains", text),
    "act": ("act__startswith", text),
    "object": (objects_called, text),
    "at__gte": ("at__gte", moment),
    "at__lt": ("at__lt", moment),
    "after": ("id__gt", whole_number),
    "q": searching("act", "actor", "reason", "object_uid"),
}
