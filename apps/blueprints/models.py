"""The catalogues as people see them; the code is in ``esper.blueprints`` and ``esper.remedies``."""

from __future__ import annotations

from typing import Any

from django.db import models

from esper.contracts import AdaptationType, BlueprintCategory, GraftKind, Risk
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
    version = models.CharField(max_length=16)
    present = models.BooleanField(default=True)  # False: the installed code has no such blueprint
    enabled = models.BooleanField(default=True)
    disabled_reason = models.TextField(blank=True)
    revision = models.PositiveIntegerField(default=1)

    class Meta:
        ordering = ("category", "slug")

    def __str__(self) -> str:
        return self.slug


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
