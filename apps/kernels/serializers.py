from __future__ import annotations

from typing import Any

from rest_framework import serializers

from apps.kernels.models import Kernel
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
