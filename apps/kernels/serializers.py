from __future__ import annotations

from typing import Any

from rest_framework import serializers

from apps.api.fields import Members, Text
from apps.kernels.models import CompileJob, Kernel, Worker


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


class JobOutput(serializers.ModelSerializer[CompileJob]):
    config = Members()
    layer = serializers.SerializerMethodField()
    kernel = serializers.CharField(source="kernel.digest", default=None, allow_null=True)

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
            "queued_at",
            "started_at",
            "ended_at",
        )

    def get_layer(self, job: CompileJob) -> str:
        return str(job.layer.get("name", ""))


class WorkerOutput(serializers.ModelSerializer[Worker]):
    queues = serializers.ListField(child=serializers.CharField())
    devices = serializers.ListField(child=serializers.CharField())
    versions = Members()

    class Meta:
        model = Worker
        fields = (
            "name",
            "host",
            "capability",
            "queues",
            "devices",
            "versions",
            "state",
            "started_at",
            "heartbeat_at",
        )


class HeartbeatInput(serializers.Serializer[Any]):
    instance = Text(max_length=100)
    status = Members(default=dict)
