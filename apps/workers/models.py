"""Workers, the compile jobs that they take, and the rounds of periodic tasks."""

from __future__ import annotations

from functools import partial

from django.db import models

from apps.accounts.visibility import InProjects, of_run_uid
from apps.rest.identifiers import UID_LENGTH, new_uid
from esper.contracts import JobState, JobStep, WorkerKind, WorkerMode, WorkerState


class Worker(models.Model):
    """A Celery worker process, as its own heartbeat describes it; Tamiyo is listed with them.

    The heartbeat writes what the worker is. People and repeated crashes write ``mode``, what the
    worker may do.
    """

    name = models.CharField(max_length=120, unique=True)
    kind = models.CharField(
        max_length=8, choices=[(k, k) for k in WorkerKind], default=WorkerKind.CONTROL
    )
    host = models.CharField(max_length=120, db_index=True)
    capabilities = models.JSONField(default=list)  # what it compiles for: "cpu", "cuda.sm90"
    queues = models.JSONField(default=list)
    devices = models.JSONField(default=list)  # {device, name, capability, memory_free_mib, …}
    versions = models.JSONField(default=dict)
    memory_free_mib = models.PositiveIntegerField(null=True)  # the host's
    memory_total_mib = models.PositiveIntegerField(null=True)
    state = models.CharField(max_length=8, choices=[(s, s) for s in WorkerState])
    started_at = models.DateTimeField()
    heartbeat_at = models.DateTimeField()
    mode = models.CharField(
        max_length=11, choices=[(m, m) for m in WorkerMode], default=WorkerMode.ACTIVE
    )
    mode_reason = models.TextField(blank=True)
    mode_by = models.CharField(max_length=150, blank=True)
    mode_at = models.DateTimeField(null=True, blank=True)
    crashes = models.PositiveIntegerField(default=0)  # builder children lost in a row

    class Meta:
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name


class CompileJob(models.Model):
    """One request for a kernel. ``attempt`` is the fence: a late worker is refused."""

    uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "job"), editable=False
    )
    adaptation_uid = models.CharField(max_length=UID_LENGTH, db_index=True)
    run_uid = models.CharField(max_length=UID_LENGTH, db_index=True)
    blueprint_slug = models.CharField(max_length=60)
    config = models.JSONField(default=dict)
    layer = models.JSONField()  # LayerInfo.to_wire()
    capability = models.CharField(max_length=40)
    state = models.CharField(
        max_length=10, choices=[(s, s) for s in JobState], default=JobState.QUEUED, db_index=True
    )
    attempt = models.PositiveSmallIntegerField(default=0)
    lease_owner = models.CharField(max_length=120, blank=True)
    lease_until = models.DateTimeField(null=True, blank=True)
    # The result, in the kernel cache; empty until there is one.
    kernel_digest = models.CharField(max_length=64, blank=True, db_index=True)
    cached = models.BooleanField(default=False)
    build_ms = models.FloatField(null=True, blank=True)
    error = models.TextField(blank=True)
    waits_for = models.TextField(blank=True)  # why no worker takes it, for people
    log = models.TextField(blank=True)  # the end of what each attempt wrote
    queued_at = models.DateTimeField(auto_now_add=True)
    started_at = models.DateTimeField(null=True, blank=True)
    ended_at = models.DateTimeField(null=True, blank=True)

    objects = InProjects["CompileJob"]()
    visible_in = staticmethod(of_run_uid)

    class Meta:
        ordering = ("-id",)

    def __str__(self) -> str:
        return f"{self.uid} {self.blueprint_slug} {self.state}"


class JobStepDone(models.Model):
    """One step of one attempt at a job, and when it was done."""

    job = models.ForeignKey(CompileJob, on_delete=models.CASCADE, related_name="steps")
    attempt = models.PositiveSmallIntegerField()
    step = models.CharField(max_length=10, choices=[(s, s) for s in JobStep])
    at = models.DateTimeField()

    class Meta:
        ordering = ("id",)
        constraints = (
            models.UniqueConstraint(
                fields=("job", "attempt", "step"), name="one_row_for_each_step_of_an_attempt"
            ),
        )

    def __str__(self) -> str:
        return f"{self.job_id} {self.attempt} {self.step}"


class PeriodicTask(models.Model):
    """When a periodic task last did its round, so that a missing one is seen."""

    name = models.CharField(max_length=100, unique=True)
    ran_at = models.DateTimeField()

    class Meta:
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name
