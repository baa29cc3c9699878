from __future__ import annotations

from rest_framework import serializers

from apps.violations.models import Violation


class ViolationOutput(serializers.ModelSerializer[Violation]):
    number = serializers.IntegerField()
    run = serializers.CharField(source="run.uid", default=None, allow_null=True)
    acknowledged_by = serializers.CharField(
        source="acknowledged_by.username", default=None, allow_null=True
    )

    class Meta:
        model = Violation
        fields = (
            "uid",
            "number",
            "run",
            "adaptation_uid",
            "layer",
            "step",
            "since_step",
            "resolved_step",
            "rule",
            "finding",
            "severity",
            "observed",
            "limit",
            "text",
            "action",
            "created_at",
            "acknowledged_by",
            "acknowledged_at",
            "note",
        )
