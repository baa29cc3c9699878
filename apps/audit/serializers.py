from __future__ import annotations

from typing import Any

from rest_framework import serializers

from apps.audit.models import AuditEvent
from apps.rest.fields import Members


class AuditEventOutput(serializers.ModelSerializer[AuditEvent]):
    data = Members()  # type: ignore[assignment]  # a field; the metaclass takes it away

    class Meta:
        model = AuditEvent
        fields = (
            "id",
            "at",
            "actor_kind",
            "actor",
            "via",
            "act",
            "object_kind",
            "object_uid",
            "run_uid",
            "reason",
            "data",
            "previous_hash",
            "hash",
        )


class ChainOutput(serializers.Serializer[Any]):
    """``problem`` names the first thing that is wrong; ``event_id`` says where.

    ``signed_events``: so many are covered by the newest signed head, which was made at
    ``signed_at``.
    """

    verified = serializers.BooleanField()
    events = serializers.IntegerField()
    head = serializers.CharField()
    problem = serializers.CharField()
    event_id = serializers.IntegerField(allow_null=True)
    signed_events = serializers.IntegerField()
    signed_at = serializers.DateTimeField(allow_null=True)
