from __future__ import annotations

from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from apps.adaptations.serializers import ShadowOutput
from apps.adaptations.variants import advantages, cases_of, trials_of
from apps.blueprints.models import Variant
from apps.rest.fields import Members


class VariantOutput(serializers.ModelSerializer[Variant]):
    """A blueprint with some numbers at ``factors`` of the usual ones, and where it comes from.

    ``learned_from`` has the closed grafts and the trials that the caller may see; ``unseen``: how
    many others there were. ``gains``: over the proposed size, of each decision at which both were
    tried, a share of the held-out loss.
    """

    blueprint = serializers.CharField(source="blueprint.slug")
    change = serializers.CharField(source="key")
    factors = Members()
    decided_by = serializers.CharField(source="decided_by.username", default=None, allow_null=True)
    learned_from = serializers.SerializerMethodField()
    unseen = serializers.SerializerMethodField()
    trials = serializers.SerializerMethodField()
    gains = serializers.SerializerMethodField()

    class Meta:
        model = Variant
        fields = (
            "uid",
            "blueprint",
            "change",
            "factors",
            "state",
            "revision",
            "policy",
            "chance",
            "expected",
            "error",
            "learned_from",
            "unseen",
            "trials",
            "gains",
            "created_at",
            "decided_by",
            "decided_at",
            "reason",
        )

    @extend_schema_field(serializers.ListField(child=serializers.CharField()))
    def get_learned_from(self, variant: Variant) -> Any:
        grafts, trials, _ = cases_of(variant)
        return [graft.uid for graft in grafts] + [trial.uid for trial in trials]

    @extend_schema_field(serializers.IntegerField())
    def get_unseen(self, variant: Variant) -> Any:
        return cases_of(variant)[2]

    @extend_schema_field(ShadowOutput(many=True))
    def get_trials(self, variant: Variant) -> Any:
        return ShadowOutput(trials_of(variant), many=True).data

    @extend_schema_field(serializers.ListField(child=serializers.FloatField()))
    def get_gains(self, variant: Variant) -> Any:
        return advantages(variant)
