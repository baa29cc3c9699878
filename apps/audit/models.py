"""The append-only log. Triggers in the first migration refuse UPDATE and DELETE."""

from __future__ import annotations

from django.db import models

from apps.rest.identifiers import UID_LENGTH


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

    class Meta:
        ordering = ("-id",)

    def __str__(self) -> str:
        return f"{self.id} {self.actor} {self.act} {self.object_uid}"


class AuditHead(models.Model):
    """The end of the chain, one row; writers lock it."""

    last_id = models.BigIntegerField(default=0)
    last_hash = models.CharField(max_length=64, default="0" * 64)
