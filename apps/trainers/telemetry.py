"""A trainer's batch of telemetry: what its types cannot say is checked here."""

from __future__ import annotations

from collections.abc import Sequence

from apps.adaptations.services import pay_later_looks, withdraw_answered
from apps.runs.models import Run
from apps.telemetry.services import ingest_batch
from apps.violations.services import record_findings
from esper import tracing
from esper.contracts import SIGNALS, Finding, columns_of
from esper.contracts.protocol import Telemetry, TelemetryAnswer
from esper.exceptions import MessageError

MAX_BATCH_VALUES = 20_000  # of all metrics; they are rows, about 0.1 ms each


def take_telemetry(*, run: Run, batch: Telemetry) -> TelemetryAnswer:
    """Store a batch once.

    Raises:
        MessageError: a frame has other layers than the run, or there are too many values.
        Problem: the run has a newer epoch, or has ended.
    """
    _check_frames(batch, layers=run.layer_count)
    if sum(len(entry.values) for entry in batch.metrics) > MAX_BATCH_VALUES:
        raise MessageError(f"at most {MAX_BATCH_VALUES} values in one batch", pointer="/metrics")
    with tracing.span("ingest", run=run.uid, frames=len(batch.frames), metrics=len(batch.metrics)):
        answer = ingest_batch(run=run, batch=batch, record_findings=_record_findings)
    if not answer.duplicate:
        pay_later_looks(run, batch.metrics)
    return answer


def _record_findings(*, run: Run, findings: Sequence[Finding]) -> int:
    """Stores them; what waits for an approval because of one that is over is withdrawn."""
    count = record_findings(run=run, findings=findings)
    withdraw_answered(run, findings)
    return count


def _check_frames(batch: Telemetry, *, layers: int) -> None:
    expected = layers * len(SIGNALS) * 4
    if all(len(frame.values) == expected for frame in batch.frames):
        return
    for index, frame in enumerate(batch.frames):
        if not columns_of(len(frame.values), layers):
            raise MessageError(
                f"{layers} layers x {len(SIGNALS)} signals are {expected} bytes, "
                f"got {len(frame.values)}",
                pointer=f"/frames/{index}/values",
            )
