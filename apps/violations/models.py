"""Limits and rules that were broken, with what the system did about it."""

from __future__ import annotations

from functools import partial

from django.conf import settings
from django.db import models

from apps.accounts.visibility import InProjects, of_run_or_none
from apps.rest.identifiers import UID_LENGTH, new_uid
from apps.runs.models import Run
from esper.contracts import MAX_NAME_LENGTH, Severity, ViolationRule


class Violation(models.Model):
    uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "vio"), editable=False
    )
    run = models.ForeignKey(
        Run, on_delete=models.CASCADE, null=True, blank=True, related_name="violations"
    )
    adaptation_uid = models.CharField(max_length=UID_LENGTH, blank=True, db_index=True)
    layer = models.CharField(max_length=MAX_NAME_LENGTH, blank=True)
    step = models.BigIntegerField(null=True, blank=True)
    since_step = models.BigIntegerField(null=True, blank=True)
    resolved_step = models.BigIntegerField(null=True, blank=True)
    finding = models.CharField(max_length=64, blank=True)  # slug of the rule of the diagnosis
    # what can answer it, slugs of ``esper.remedies.catalog`` in the order in which to try them
    remedies = models.JSONField(default=list)
    rule = models.CharField(max_length=24, choices=[(r, r) for r in ViolationRule], db_index=True)
    severity = models.CharField(max_length=8, choices=[(s, s) for s in Severity])
    observed = models.CharField(max_length=200)
    limit = models.CharField(max_length=200)
    text = models.TextField()
    action = models.TextField()  # what was done
    advice = models.TextField(blank=True)  # what a person can do
    created_at = models.DateTimeField(auto_now_add=True)
    acknowledged_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True
    )
    acknowledged_at = models.DateTimeField(null=True, blank=True)
    note = models.TextField(blank=True)

    objects = InProjects["Violation"]()
    visible_in = staticmethod(of_run_or_none)

    class Meta:
        ordering = ("-id",)

    def __str__(self) -> str:
        return f"V-{self.pk} {self.rule}"

    @property
    def number(self) -> int:
        return self.pk
