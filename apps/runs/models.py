"""Runs and their command logs."""

from __future__ import annotations

from functools import partial

from django.conf import settings
from django.db import models

from apps.accounts.models import DEFAULT_PROJECT, Project
from apps.accounts.visibility import InProjects, of_projects, of_run
from apps.rest.identifiers import UID_LENGTH, new_uid
from esper.contracts import (
    MAX_NAME_LENGTH,
    RUN_ENDED,
    CommandKind,
    CommandState,
    LayerInfo,
    RunMode,
    RunState,
    wire,
)
from esper.contracts.spans import span, why_no_span


class Run(models.Model):
    """One training of one model. ``epoch`` counts the trainer's starts; older ones are refused.

    ``restored_at`` is set while the database, restored from a backup, may be older than what its
    trainer does; the trainer then registers again.
    """

    uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "run"), editable=False
    )
    name = models.CharField(max_length=MAX_NAME_LENGTH)
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="runs"
    )
    project = models.ForeignKey(
        Project, on_delete=models.PROTECT, default=DEFAULT_PROJECT, related_name="runs"
    )
    mode = models.CharField(max_length=12, choices=[(m, m.capitalize()) for m in RunMode])
    state = models.CharField(
        max_length=12,
        choices=[(s, s.capitalize()) for s in RunState],
        default=RunState.STARTING,
        db_index=True,
    )
    epoch = models.PositiveIntegerField(default=1)
    host = models.CharField(max_length=120, blank=True)
    capability = models.CharField(max_length=40, default="cpu")  # of its first device
    capabilities = models.JSONField(default=dict)  # {"cuda:1": "cuda.sm90"}, where it has several
    versions = models.JSONField(default=dict)
    layers = models.JSONField(default=list)  # LayerInfo.to_wire(), in the order of the frames' rows
    # The telemetry of a run with thousands of layers must not read them all for each batch.
    layer_count = models.PositiveIntegerField(default=0)
    model_parameters = models.BigIntegerField(default=0)
    target_steps = models.BigIntegerField(null=True, blank=True)
    step = models.BigIntegerField(default=0)
    # [epoch, after step, up to step] of what was learned and taken back, with an undo to the state
    # before a graft: these losses are of weights that the run does not have any more
    taken_back = models.JSONField(default=list, db_default=[])
    last_loss = models.FloatField(null=True, blank=True)
    last_loss_status = models.CharField(max_length=4, blank=True)  # "nan", "inf", "-inf"
    telemetry_seq = models.BigIntegerField(default=0)
    dropped_items = models.BigIntegerField(default=0)
    command_seq = models.BigIntegerField(default=0)
    adaptation_paused_by = models.CharField(max_length=150, blank=True)
    adaptation_paused_at = models.DateTimeField(null=True, blank=True)
    quarantined_reason = models.TextField(blank=True)
    restored_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    last_seen_at = models.DateTimeField(null=True, blank=True)
    ended_at = models.DateTimeField(null=True, blank=True)
    end_reason = models.TextField(blank=True)

    objects = InProjects["Run"]()
    visible_in = staticmethod(of_projects)

    class Meta:
        ordering = ("-id",)
        constraints = (
            models.UniqueConstraint(
                fields=("project", "owner", "name"),
                condition=~models.Q(state__in=sorted(RUN_ENDED)),
                name="one_live_run_per_project_owner_and_name",
            ),
        )

    def __str__(self) -> str:
        return f"R-{self.pk} {self.name}"

    @property
    def number(self) -> int:
        return self.pk

    @property
    def ended(self) -> bool:
        return self.state in RUN_ENDED

    def capability_of(self, device: str) -> str:
        """What kernels for this device of the run are compiled for."""
        return str(self.capabilities.get(device, self.capability))

    def layer_infos(self) -> tuple[LayerInfo, ...]:
        return wire.from_wire(tuple[LayerInfo, ...], self.layers)

    def layer_info(self, name: str) -> LayerInfo | None:
        found = next((layer for layer in self.layers if layer["name"] == name), None)
        return LayerInfo.from_wire(found) if found else None

    def place_of(self, layer: str, since: str) -> LayerInfo | str:
        """Where a graft goes that spans layers if ``since`` is not empty; why not, a sentence."""
        first, last = self.layer_info(since or layer), self.layer_info(layer)
        if first is None or last is None:
            return f"Run {self.name} has no layer called {layer if last is None else since!r}."
        if not since:
            return last
        reason = why_no_span(first, last)
        return f"No graft can span {since} … {layer}: {reason}." if reason else span(first, last)


class Command(models.Model):
    """One entry of a run's ordered command log (``esper.contracts.Command``)."""

    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="commands")
    epoch = models.PositiveIntegerField()
    seq = models.BigIntegerField()
    kind = models.CharField(max_length=20, choices=[(k, k) for k in CommandKind])
    adaptation_uid = models.CharField(max_length=UID_LENGTH, blank=True, db_index=True)
    layer = models.CharField(max_length=MAX_NAME_LENGTH, blank=True)
    kernel_digest = models.CharField(max_length=64, blank=True)
    payload = models.JSONField(default=dict)
    issued_at = models.DateTimeField()
    expires_at = models.DateTimeField()
    signature = models.CharField(max_length=120)
    state = models.CharField(
        max_length=10, choices=[(s, s) for s in CommandState], default=CommandState.ISSUED
    )
    code = models.CharField(max_length=30, blank=True)
    reason = models.TextField(blank=True)
    step = models.BigIntegerField(null=True, blank=True)
    pause_ms = models.FloatField(null=True, blank=True)
    acknowledged_at = models.DateTimeField(null=True, blank=True)

    objects = InProjects["Command"]()
    visible_in = staticmethod(of_run)

    class Meta:
        ordering = ("run", "seq")
        constraints = (
            models.UniqueConstraint(fields=("run", "seq"), name="one_command_per_run_and_seq"),
        )

    def __str__(self) -> str:
        return f"{self.kind} #{self.seq} for {self.run_id}"
