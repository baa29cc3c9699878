"""The append-only log. Triggers in the first migration refuse UPDATE and DELETE."""

from __future__ import annotations

from django.db import models
from django.db.models import Q

from apps.accounts.models import Project
from apps.accounts.visibility import InProjects, of_run_uid
from apps.rest.identifiers import UID_LENGTH


def _visible_in(projects: frozenset[int]) -> Q:
    """Events of runs and launches of these projects, of these projects, and of the server."""
    of_server = Q(run_uid="") & ~Q(object_kind="project")
    own = Project.objects.filter(pk__in=projects).values("uid")
    return of_server | of_run_uid(projects) | Q(object_kind="project", object_uid__in=own)


class AuditEvent(models.Model):
    """One event; ``hash`` covers the row and the hash of the previous one."""

    id = models.BigIntegerField(primary_key=True)  # gapless: 1, 2, 3 …
    at = models.DateTimeField(db_index=True)
    actor_kind = models.CharField(max_length=12)
    actor = models.CharField(max_length=150, db_index=True)
    via = models.CharField(max_length=80, blank=True)
    act = models.CharField(max_length=60, db_index=True)
    object_kind = models.CharField(max_length=30)
    object_uid = models.CharField(max_length=64, db_index=True)
    run_uid = models.CharField(max_length=UID_LENGTH, blank=True, db_index=True)
    reason = models.TextField(blank=True)
    data = models.JSONField(default=dict)
    previous_hash = models.CharField(max_length=64)
    hash = models.CharField(max_length=64)

    objects = InProjects["AuditEvent"]()
    chain: models.Manager[AuditEvent] = models.Manager()  # all rows, whoever asks
    visible_in = staticmethod(_visible_in)

    class Meta:
        ordering = ("-id",)

    def __str__(self) -> str:
        return f"{self.id} {self.actor} {self.act} {self.object_uid}"


class AuditHead(models.Model):
    """The end of the chain, one row; writers lock it."""

    last_id = models.BigIntegerField(default=0)
    last_hash = models.CharField(max_length=64, default="0" * 64)
