from __future__ import annotations

from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from apps.rest.fields import Members
from apps.workers.models import CompileJob, JobStepDone, Worker


class JobStepOutput(serializers.ModelSerializer[JobStepDone]):
    class Meta:
        model = JobStepDone
        fields = ("attempt", "step", "at")


class JobOutput(serializers.ModelSerializer[CompileJob]):
    config = Members()
    layer = serializers.SerializerMethodField()
    kernel = serializers.SerializerMethodField()
    steps = JobStepOutput(many=True, read_only=True)

    class Meta:
        model = CompileJob
        fields = (
            "uid",
            "adaptation_uid",
            "run_uid",
            "blueprint_slug",
            "config",
            "layer",
            "capability",
            "state",
            "attempt",
            "lease_owner",
            "lease_until",
            "kernel",
            "cached",
            "build_ms",
            "error",
            "waits_for",
            "steps",
            "log",
            "queued_at",
            "started_at",
            "ended_at",
        )

    def get_layer(self, job: CompileJob) -> str:
        return str(job.layer.get("name", ""))

    def get_kernel(self, job: CompileJob) -> str | None:
        return job.kernel_digest or None


class CurrentJobOutput(serializers.ModelSerializer[CompileJob]):
    steps = serializers.SerializerMethodField()

    class Meta:
        model = CompileJob
        fields = ("uid", "adaptation_uid", "blueprint_slug", "attempt", "started_at", "steps")

    def get_steps(self, job: CompileJob) -> list[dict[str, Any]]:
        mine = [step for step in job.steps.all() if step.attempt == job.attempt]
        return list(JobStepOutput(mine, many=True).data)


class WorkerOutput(serializers.ModelSerializer[Worker]):
    capabilities = serializers.ListField(child=serializers.CharField())
    queues = serializers.ListField(child=serializers.CharField())
    devices = serializers.ListField(child=Members())
    versions = Members()
    job = serializers.SerializerMethodField()

    class Meta:
        model = Worker
        fields = (
            "name",
            "kind",
            "host",
            "capabilities",
            "queues",
            "devices",
            "versions",
            "memory_free_mib",
            "memory_total_mib",
            "state",
            "mode",
            "mode_reason",
            "mode_by",
            "mode_at",
            "crashes",
            "job",
            "started_at",
            "heartbeat_at",
        )

    @extend_schema_field(CurrentJobOutput(allow_null=True))
    def get_job(self, worker: Worker) -> dict[str, Any] | None:
        job = self.context["jobs"].get(worker.name)
        return dict(CurrentJobOutput(job).data) if job is not None else None
