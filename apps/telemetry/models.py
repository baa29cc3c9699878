"""Health frames and metrics; old ones are thinned."""

from __future__ import annotations

import numpy as np
from django.db import models
from numpy.typing import NDArray

from apps.accounts.visibility import InProjects, of_run
from apps.runs.models import Run
from esper.contracts import unpack_bytes


class Frame(models.Model):
    """One health frame: little-endian float32 [layers, signals], and the loss of its step.

    Where ``loss_status`` names a non-finite loss, ``loss`` is null; both are empty where the
    trainer measured none.
    """

    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="frames")
    epoch = models.PositiveIntegerField()
    step = models.BigIntegerField()
    wall_time = models.FloatField()
    values = models.BinaryField()
    loss = models.FloatField(null=True)
    loss_status = models.CharField(max_length=4, blank=True)

    objects = InProjects["Frame"]()
    visible_in = staticmethod(of_run)

    class Meta:
        ordering = ("run", "step")
        indexes = (models.Index(fields=("run", "step"), name="frame_by_run_and_step"),)

    @property
    def known_loss(self) -> float | None:
        """May be non-finite; None: not measured."""
        return float(self.loss_status) if self.loss_status else self.loss

    def matrix(self, layers: int) -> NDArray[np.float32]:
        """float32 [layers, signals]."""
        return unpack_bytes(bytes(self.values), layers)


class Metric(models.Model):
    """One run-wide number; where ``status`` names a non-finite value, ``value`` is null."""

    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="metrics")
    epoch = models.PositiveIntegerField()
    step = models.BigIntegerField()
    wall_time = models.FloatField()
    name = models.CharField(max_length=80)
    value = models.FloatField(null=True)
    status = models.CharField(max_length=4, blank=True)

    objects = InProjects["Metric"]()
    visible_in = staticmethod(of_run)

    class Meta:
        ordering = ("run", "name", "step")
        indexes = (models.Index(fields=("run", "name", "step"), name="metric_by_run_name_step"),)

    @property
    def number(self) -> float:
        return float(self.status) if self.status else float(self.value or 0.0)
