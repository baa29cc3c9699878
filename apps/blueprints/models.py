"""The catalogues as people see them; the code is in ``esper.blueprints`` and ``esper.remedies``."""

from __future__ import annotations

from functools import partial
from typing import Any

from django.conf import settings
from django.db import models

from apps.rest.identifiers import UID_LENGTH, new_uid
from esper.contracts import AdaptationType, BlueprintCategory, GraftKind, Risk, VariantState
from esper.contracts.remedies import in_words


class Blueprint(models.Model):
    slug = models.SlugField(max_length=60, unique=True)
    ident = models.CharField(max_length=60, unique=True)  # "BP-PROJ-LoRA-64"
    title = models.CharField(max_length=120)
    category = models.CharField(max_length=24, choices=[(c, c) for c in BlueprintCategory])
    kind = models.CharField(max_length=12, choices=[(k, k) for k in GraftKind])
    adaptation_type = models.CharField(max_length=20, choices=[(t, t) for t in AdaptationType])
    risk = models.CharField(max_length=8, choices=[(r, r) for r in Risk])
    mergeable = models.BooleanField(default=False)
    idea = models.TextField()
    source = models.TextField(blank=True)
    when = models.TextField(blank=True)
    conflicts = models.JSONField(default=list)
    requires = models.JSONField(default=list)  # one of these must sit on the layer first
    tunes = models.JSONField(default=list)  # settings of which variants may be learned
    version = models.CharField(max_length=16)
    present = models.BooleanField(default=True)  # False: the installed code has no such blueprint
    enabled = models.BooleanField(default=True)
    disabled_reason = models.TextField(blank=True)
    revision = models.PositiveIntegerField(default=1)

    class Meta:
        ordering = ("category", "slug")

    def __str__(self) -> str:
        return self.slug


class Variant(models.Model):
    """A blueprint with some numbers at factors of the usual ones, suggested from experience.

    Only ``apps.adaptations.variants`` writes its ``state``. A withdrawn one stays, so that it is
    never suggested again.
    """

    uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "var"), editable=False
    )
    blueprint = models.ForeignKey(Blueprint, on_delete=models.CASCADE, related_name="variants")
    factors = models.JSONField()
    key = models.CharField(max_length=200)  # of its factors, for people too
    state = models.CharField(
        max_length=12, choices=[(s, s) for s in VariantState], default=VariantState.SUGGESTED
    )
    revision = models.PositiveIntegerField(default=1)
    # where it comes from
    policy = models.CharField(max_length=40)
    chance = models.FloatField(null=True)
    expected = models.FloatField(null=True)  # advantage over the usual size, a share of the loss
    error = models.FloatField(null=True)
    learned_from = models.JSONField(default=list)  # uids of closed grafts and trials in shadow
    created_at = models.DateTimeField(auto_now_add=True)
    # who admitted it, or withdrew it
    decided_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+"
    )
    decided_at = models.DateTimeField(null=True, blank=True)
    reason = models.TextField(blank=True)

    class Meta:
        ordering = ("-id",)
        constraints = (
            models.UniqueConstraint(fields=("blueprint", "key"), name="variant_is_suggested_once"),
            models.CheckConstraint(
                condition=models.Q(state__in=sorted(VariantState)), name="variant_state_is_known"
            ),
        )

    def __str__(self) -> str:
        return f"{self.blueprint_id}: {self.key}"


class KnownRemedy(models.Model):
    """A remedy of ``esper.remedies.catalog``; its attributes have the same names."""

    slug = models.SlugField(max_length=60, unique=True)
    title = models.CharField(max_length=120)
    phrase = models.CharField(max_length=200)
    idea = models.TextField()
    source = models.TextField(blank=True)
    when = models.TextField(blank=True)
    risk = models.CharField(max_length=8, choices=[(r, r) for r in Risk])
    changes_weights = models.BooleanField(default=False)
    stays = models.BooleanField(default=True)
    asks = models.BooleanField(default=False)
    scope = models.CharField(max_length=8)  # "run", "layer" or "both"
    settings = models.JSONField(default=dict)  # name -> default
    present = models.BooleanField(default=True)  # False: the installed code has no such remedy

    class Meta:
        ordering = ("slug",)

    def __str__(self) -> str:
        return self.slug

    @property
    def changes_nothing(self) -> bool:
        """It measures or saves something; there is nothing to judge and nothing to take back."""
        return not self.changes_weights and not self.stays

    def in_words(self, config: dict[str, Any]) -> str:
        """What it would do with these settings; the others take their defaults."""
        return in_words(self.phrase, {**self.settings, **config})
