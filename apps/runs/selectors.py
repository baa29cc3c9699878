"""Runs as callers may see them."""

from __future__ import annotations

from django.db.models import QuerySet
from rest_framework.request import Request

from apps.accounts.problems import not_found
from apps.api.endpoint import check_run_of_token, run_of_token
from apps.runs.models import Run


def visible_runs(request: Request) -> QuerySet[Run]:
    """All runs for people and services; its own one for a run token."""
    runs = Run.objects.select_related("owner")
    own = run_of_token(request)
    return runs.filter(uid=own) if own else runs


def visible_run(request: Request, uid: str) -> Run:
    """Raises ``Problem`` 404, also for a run that is not the token's."""
    check_run_of_token(request, uid)
    run = visible_runs(request).filter(uid=uid).first()
    if run is None:
        raise not_found("run")
    return run
