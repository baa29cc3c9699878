from __future__ import annotations

from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from apps.kernels.models import CompileJob, JobStepDone, Kernel, Worker
from apps.rest.fields import Members, Text


class KernelOutput(serializers.ModelSerializer[Kernel]):
    config = Members()
    in_shape = serializers.ListField(child=serializers.IntegerField())
    certificate = Members()
    stage_ms = Members()

    class Meta:
        model = Kernel
        fields = (
            "digest",
            "blueprint_slug",
            "config",
            "layer_kind",
            "in_shape",
            "dtype",
            "capability",
            "device_name",
            "tier",
            "parameters",
            "latency_ms",
            "memory_mib",
            "forecast_latency_ms",
            "forecast_memory_mib",
            "forward_p50_ms",
            "forward_p95_ms",
            "backward_p50_ms",
            "backward_p95_ms",
            "peak_memory_mib",
            "certificate",
            "stage_ms",
            "build_ms",
            "size_bytes",
            "uses",
            "built_by",
            "built_at",
            "last_used_at",
            "pinned_by",
            "evicted_at",
            "scrubbed_at",
        )


class CacheActInput(serializers.Serializer[Any]):
    reason = Text(max_length=2000, allow_blank=True, default="")


class CacheStatsOutput(serializers.Serializer[Any]):
    kernels = serializers.IntegerField()
    bytes = serializers.IntegerField()
    limit_bytes = serializers.IntegerField()
    pinned = serializers.IntegerField()
    hits = serializers.IntegerField()
    misses = serializers.IntegerField()
    hit_ratio = serializers.FloatField(allow_null=True)
    mean_cached_ms = serializers.FloatField(allow_null=True)
    mean_cold_ms = serializers.FloatField(allow_null=True)
    host_hits = serializers.IntegerField()
    server_hits = serializers.IntegerField()
    host_evictions = serializers.IntegerField()
    evictions = serializers.IntegerField()
    corrupt = serializers.IntegerField()
    scrubbed = serializers.IntegerField()
    warmed = serializers.IntegerField()


class JobStepOutput(serializers.ModelSerializer[JobStepDone]):
    class Meta:
        model = JobStepDone
        fields = ("attempt", "step", "at")


class JobOutput(serializers.ModelSerializer[CompileJob]):
    config = Members()
    layer = serializers.SerializerMethodField()
    kernel = serializers.CharField(source="kernel.digest", default=None, allow_null=True)
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


class HeartbeatInput(serializers.Serializer[Any]):
    instance = Text(max_length=100)
    status = Members(default=dict)
