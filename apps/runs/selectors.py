"""Runs as callers may see them."""

from __future__ import annotations

from django.db.models import Q, QuerySet

from apps.rest.filters import (
    Lookup,
    between,
    many_of,
    moment,
    one_of,
    searching,
    text,
    whole_number,
)
from apps.rest.identifiers import named
from apps.rest.problems import not_found
from apps.runs.models import Run
from esper.contracts import RunMode, RunState

FILTERS: dict[str, Lookup] = {
    "state": ("state", one_of(RunState)),
    "state__in": ("state__in", many_of(RunState)),
    "mode": ("mode", one_of(RunMode)),
    "name": ("name", text),
    "owner": ("owner__username", text),
    "project": ("project__uid", text),
    "q": searching("name", "host", "owner__username", "uid"),
    **between(whole_number, "step"),
    **between(moment, "created_at"),
}
ORDER = ("created_at", "name", "step")
# Megabytes, where a model has thousands of layers; what needs one of them reads it for itself.
HUGE_COLUMNS = ("layers", "versions")
HUGE_COLUMNS_OF_RUN = tuple(f"run__{name}" for name in HUGE_COLUMNS)  # of rows with a run


def runs(*, only: str = "") -> QuerySet[Run]:
    """All runs; just the one with the uid ``only`` for a caller whose token is restricted to it."""
    rows = Run.objects.select_related("owner", "project")
    return rows.filter(uid=only) if only else rows


def project_of(run_uid: str) -> int | None:
    """The key of a run's project; None where there is no such run."""
    return Run.objects.filter(uid=run_uid).values_list("project_id", flat=True).first()


def of_run_uid(value: str) -> Q:
    """Rows that hold a run's uid alone, by that uid or by the run's name."""
    return Q(run_uid=value) | Q(run_uid__in=Run.objects.filter(name=value).values("uid"))


def visible_run(uid: str, *, only: str = "", without: tuple[str, ...] = ()) -> Run:
    """A run, its columns ``without`` left for later; ``Problem`` 404 if it is not the token's."""
    run = runs(only=only).defer(*without).filter(named(uid, "R")).first()
    if run is None:
        raise not_found("run")
    return run
