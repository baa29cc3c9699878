"""Kernels, the cache that holds them, and what is built ahead or compiled for speed."""

from __future__ import annotations

from django.db import models

from apps.accounts.visibility import InProjects, of_run_uid
from apps.rest.identifiers import UID_LENGTH
from esper.contracts import (
    MAX_NAME_LENGTH,
    JobState,
    SpeedUpState,
)


class Kernel(models.Model):
    """A stored, signed bundle; ``digest`` is the SHA-256 of its manifest and names its files."""

    digest = models.CharField(max_length=64, unique=True)
    key_hash = models.CharField(max_length=64, unique=True)
    blueprint_slug = models.CharField(max_length=60, db_index=True)
    config = models.JSONField(default=dict)
    layer_kind = models.CharField(max_length=80)
    in_shape = models.JSONField(default=list)
    dtype = models.CharField(max_length=20)
    capability = models.CharField(max_length=40)
    device_name = models.CharField(max_length=120)
    tier = models.PositiveSmallIntegerField(default=0)
    parameters = models.BigIntegerField()
    latency_ms = models.FloatField(null=True)
    memory_mib = models.FloatField(null=True)
    # Shape arithmetic from before the build, beside what was measured after it.
    forecast_latency_ms = models.FloatField(null=True)
    forecast_memory_mib = models.FloatField(null=True)
    forward_p50_ms = models.FloatField(null=True)
    forward_p95_ms = models.FloatField(null=True)
    backward_p50_ms = models.FloatField(null=True)
    backward_p95_ms = models.FloatField(null=True)
    peak_memory_mib = models.FloatField(null=True)
    certificate = models.JSONField()
    stage_ms = models.JSONField(default=dict)
    build_ms = models.FloatField()
    size_bytes = models.PositiveIntegerField()
    uses = models.PositiveIntegerField(default=0)
    built_by = models.CharField(max_length=120)
    built_at = models.DateTimeField(auto_now_add=True)
    last_used_at = models.DateTimeField(null=True, blank=True)
    pinned_by = models.CharField(max_length=150, blank=True)  # empty: may be evicted
    # When its files were removed: by the size limit, by a person, or as corrupt. The row stays.
    evicted_at = models.DateTimeField(null=True, blank=True)
    scrubbed_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ("-id",)

    def __str__(self) -> str:
        return f"{self.blueprint_slug} {self.digest[:12]}"


class CacheCounter(models.Model):
    """A counter of the cache that all processes share."""

    name = models.CharField(max_length=30, primary_key=True)
    value = models.BigIntegerField(default=0)

    def __str__(self) -> str:
        return f"{self.name} {self.value}"


class WarmUp(models.Model):
    """A kernel that a run will likely need; built while no job waits."""

    key = models.CharField(max_length=64, unique=True)  # of layer, blueprint, configuration
    run_uid = models.CharField(max_length=UID_LENGTH, db_index=True)
    blueprint_slug = models.CharField(max_length=60)
    config = models.JSONField(default=dict)
    layer = models.JSONField()  # LayerInfo.to_wire()
    capability = models.CharField(max_length=40)
    state = models.CharField(
        max_length=10, choices=[(s, s) for s in JobState], default=JobState.QUEUED, db_index=True
    )
    started_at = models.DateTimeField(null=True, blank=True)
    error = models.TextField(blank=True)

    objects = InProjects["WarmUp"]()
    visible_in = staticmethod(of_run_uid)

    class Meta:
        ordering = ("id",)

    def __str__(self) -> str:
        return f"{self.blueprint_slug} for {self.run_uid}, {self.state}"


class SpeedUp(models.Model):
    """The compiled kernel (tier 1) of one graft: its state, and what was measured."""

    adaptation_uid = models.CharField(max_length=UID_LENGTH, unique=True)
    run_uid = models.CharField(max_length=UID_LENGTH, db_index=True)
    layer = models.CharField(max_length=MAX_NAME_LENGTH)
    blueprint_slug = models.CharField(max_length=60)
    capability = models.CharField(max_length=40)
    state = models.CharField(
        max_length=12,
        choices=[(s, s) for s in SpeedUpState],
        default=SpeedUpState.QUEUED,
        db_index=True,
    )
    text = models.TextField(blank=True)  # one line for a person
    kernel = models.ForeignKey(Kernel, on_delete=models.SET_NULL, null=True, blank=True)
    worker_speedup = models.FloatField(null=True, blank=True)
    speedup = models.FloatField(null=True, blank=True)  # in the trainer
    asked_at = models.DateTimeField(auto_now_add=True)
    started_at = models.DateTimeField(null=True, blank=True)
    ended_at = models.DateTimeField(null=True, blank=True)

    objects = InProjects["SpeedUp"]()
    visible_in = staticmethod(of_run_uid)

    class Meta:
        ordering = ("id",)

    def __str__(self) -> str:
        return f"{self.blueprint_slug} at {self.layer}: {self.state}"
