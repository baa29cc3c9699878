from __future__ import annotations

from typing import Any

from rest_framework import serializers

from apps.rest.fields import BoundedList, PersonsInput, Text
from apps.violations.models import Violation

MOST_AT_ONCE = 200


class ViolationOutput(serializers.ModelSerializer[Violation]):
    number = serializers.IntegerField()
    remedies = serializers.ListField(child=serializers.CharField())
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
            "remedies",
            "severity",
            "observed",
            "limit",
            "text",
            "action",
            "advice",
            "created_at",
            "acknowledged_by",
            "acknowledged_at",
            "note",
        )


class AcknowledgeInput(PersonsInput):
    """``violations``: uids; 200 at most."""

    violations = BoundedList(child=Text(max_length=40), max_length=MOST_AT_ONCE)
    reason = Text(allow_blank=True, default="")


class AcknowledgedOutput(serializers.Serializer[Any]):
    """One of several; ``code`` is empty where it was acknowledged, else ``detail`` says why not."""

    uid = serializers.CharField()
    code = serializers.CharField()
    detail = serializers.CharField()
