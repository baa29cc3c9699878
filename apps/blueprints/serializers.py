from __future__ import annotations

from rest_framework import serializers

from apps.blueprints.models import Blueprint, KnownRemedy
from apps.rest.fields import Members


class BlueprintOutput(serializers.ModelSerializer[Blueprint]):
    conflicts = serializers.ListField(child=serializers.CharField())
    requires = serializers.ListField(child=serializers.CharField())

    class Meta:
        model = Blueprint
        fields = (
            "slug",
            "ident",
            "title",
            "category",
            "kind",
            "adaptation_type",
            "risk",
            "mergeable",
            "idea",
            "source",
            "when",
            "conflicts",
            "requires",
            "version",
            "present",
            "enabled",
            "disabled_reason",
            "revision",
        )


class KnownRemedyOutput(serializers.ModelSerializer[KnownRemedy]):
    """``settings``: names and defaults. ``asks``: a person decides, in every mode."""

    settings = Members()

    class Meta:
        model = KnownRemedy
        fields = (
            "slug",
            "title",
            "idea",
            "source",
            "when",
            "risk",
            "changes_weights",
            "stays",
            "asks",
            "scope",
            "settings",
        )
