"""The safety policy's versions, and the one switch that stops all adaptation."""

from __future__ import annotations

from django.conf import settings
from django.db import models

from esper.contracts import SafetyPolicy


class PolicyVersion(models.Model):
    """One version of the thresholds; the newest one is in force. Rows are never edited."""

    version = models.PositiveIntegerField(unique=True)
    values = models.JSONField()  # SafetyPolicy.to_wire()
    reason = models.TextField()
    author = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True
    )
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("-version",)

    def __str__(self) -> str:
        return f"policy v{self.version}"

    def safety_policy(self) -> SafetyPolicy:
        return SafetyPolicy.from_wire({**self.values, "version": self.version})


class AdaptationSwitch(models.Model):
    """One row: may anything be adapted at all?"""

    on = models.BooleanField(default=True)
    changed_by = models.CharField(max_length=150, blank=True)
    reason = models.TextField(blank=True)
    changed_at = models.DateTimeField(auto_now=True)

    class Meta:
        verbose_name_plural = "adaptation switches"

    def __str__(self) -> str:
        return "on" if self.on else "off"
