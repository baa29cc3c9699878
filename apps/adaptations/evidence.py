"""What an approver is shown of a layer: its newest signals, and how far they have drifted."""

from __future__ import annotations

import math
from typing import Any

from apps.adaptations.models import Adaptation
from apps.rest.numbers import finite_or_none
from apps.runs.models import Run
from apps.telemetry.models import Frame, Metric
from esper.contracts import AdaptationState, Signal, codec

EVIDENCE_FRAMES = 12  # a signal's newest value is looked for in so many frames
# What an approver must not miss is that the layer got worse. Each of these is 100 % drift.
HEALTH_TOLERANCE = 0.4
LOSS_RISE_TOLERANCE = 0.5
_UNDECIDED = frozenset({AdaptationState.PROPOSED, AdaptationState.AWAITING_APPROVAL})


def evidence_now(adaptation: Adaptation) -> dict[str, float | None]:
    """The layer's newest signals and the run's loss; None where nothing was measured.

    They stay as they were at the decision: the page of a decided adaptation is a record.
    """
    if adaptation.decided_evidence is not None:
        return dict(adaptation.decided_evidence)
    return _measured(adaptation)


def evidence_drift(adaptation: Adaptation) -> float | None:
    """How far the layer has drifted since the proposal, as a share of the tolerance.

    None: unknown. A falling loss is no drift: training is meant to lower it.
    """
    if adaptation.decided_evidence is not None:
        return adaptation.decided_drift
    return _drift(adaptation, _measured(adaptation))


def seen_at_decision(adaptation: Adaptation, to: AdaptationState) -> dict[str, Any]:
    """The fields that keep what was seen when an undecided adaptation goes ``to`` another state."""
    if adaptation.state not in _UNDECIDED or to in _UNDECIDED:
        return {}
    now = _measured(adaptation)
    return {
        "decided_evidence": now,
        "decided_drift": _drift(adaptation, now),
        "decided_step": adaptation.run.step,
    }


def evidence_record(adaptation: Adaptation) -> dict[str, Any]:
    """What was seen at the decision, for its row of the audit log."""
    drift = adaptation.decided_drift
    return {
        "evidence_hash": adaptation.evidence_hash,
        "evidence": adaptation.evidence,
        "evidence_now": adaptation.decided_evidence,
        "evidence_drift": None if drift is None else codec.number_to_wire(drift),
        "decided_step": adaptation.decided_step,
        "asks": adaptation.asks,
    }


def pause_forecast(adaptation: Adaptation) -> dict[str, Any]:
    """How long the step after the graft will wait for torch.compile, as the trainer measured it.

    Members:
        step_ms: a usual step; None where it was not measured.
        recompiles: the layer runs in code of torch.compile; None where the trainer does not say.
        seconds: where the trainer compiles ahead; unprepared_seconds: where it cannot.
    """
    run = adaptation.run
    layer: dict[str, Any] = next((row for row in run.layers if row["name"] == adaptation.layer), {})
    recompiles = None if adaptation.remedy else layer.get("compiled")
    return {
        "step_ms": _newest(run, "step_ms"),
        "recompiles": recompiles,
        "seconds": _newest(run, "compile_ahead_s") if recompiles else None,
        "unprepared_seconds": _newest(run, "compile_s") if recompiles else None,
    }


def _newest(run: Run, name: str) -> float | None:
    rows = Metric.objects.filter(run=run, epoch=run.epoch, name=name).order_by("-step")
    return finite_or_none(rows.values_list("value", flat=True).first())


def _measured(adaptation: Adaptation) -> dict[str, float | None]:
    run = adaptation.run
    now: dict[str, float | None] = {"step": run.step, "loss": finite_or_none(run.last_loss)}
    names = tuple(layer["name"] for layer in run.layers)
    if adaptation.layer not in names:
        return now
    row = names.index(adaptation.layer)
    now |= dict.fromkeys(map(str, Signal))
    newest = Frame.objects.filter(run=run, epoch=run.epoch).order_by("-step")[:EVIDENCE_FRAMES]
    for frame in newest:  # not every frame measures every signal
        for signal, value in zip(Signal, frame.matrix(len(names))[row], strict=True):
            if now[str(signal)] is None and math.isfinite(value):
                now[str(signal)] = float(value)
    return now


def _drift(adaptation: Adaptation, now: dict[str, float | None]) -> float | None:
    if adaptation.remedy:
        return None  # it answers a fault, which may get worse; where that is over, it is withdrawn
    if adaptation.run.last_loss_status:
        return math.inf
    then = adaptation.evidence
    parts = []
    health_then, health_now = then.get("health"), now.get("health")
    if health_then is not None and health_now is not None:
        parts.append(abs(health_now - health_then) / HEALTH_TOLERANCE)
    loss_then, loss_now = then.get("loss"), now.get("loss")
    if loss_then and loss_now is not None:
        parts.append(max(0.0, loss_now / loss_then - 1.0) / LOSS_RISE_TOLERANCE)
    return max(parts) if parts else None
