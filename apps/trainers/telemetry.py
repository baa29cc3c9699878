"""A trainer's batch of telemetry: checked by hand, since DRF takes ten times as long."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator
from typing import Any, NoReturn

from apps.rest.problems import Problem
from apps.runs.models import Run
from apps.telemetry.services import Batch, FrameItem, Ingested, MetricItem, ingest_batch
from apps.violations.services import record_findings
from esper.contracts import MAX_NAME_LENGTH, SIGNALS, Severity, ViolationRule, codec
from esper.exceptions import CodecError

MAX_FRAMES = 500
MAX_METRICS = 1000  # entries, each with some values
MAX_VALUES = 64  # per entry
MAX_BATCH_VALUES = 20_000  # of all entries; they are rows, about 0.1 ms each
MAX_FINDINGS = 200
MAX_METRIC_NAME = 80
MAX_STEP = 2**53
MAX_WALL_TIME = 2.0**40


def take_telemetry(*, run: Run, data: dict[str, Any]) -> Ingested:
    """Store a batch once.

    Raises:
        Problem: something in it is wrong, the run has a newer epoch, or it has ended.
    """
    batch = parse_batch(data, layers=len(run.layers))
    return ingest_batch(run=run, batch=batch, record_findings=record_findings)


def parse_batch(data: dict[str, Any], *, layers: int) -> Batch:
    """Raises ``Problem`` 400 with a pointer to the first thing that is wrong.

    Args:
        layers: rows that each frame must have.
    """
    frames = _entries(data, "frames", MAX_FRAMES)
    metrics = _entries(data, "metrics", MAX_METRICS)
    findings = _entries(data, "findings", MAX_FINDINGS)
    batch = Batch(
        epoch=_whole(data.get("epoch"), "/epoch", most=2**31 - 1),
        seq_from=_whole(data.get("seq_from"), "/seq_from"),
        seq_to=_whole(data.get("seq_to"), "/seq_to"),
        frames=[_frame(entry, f"/frames/{i}", layers) for i, entry in enumerate(frames)],
        metrics=[
            item for i, entry in enumerate(metrics) for item in _metrics(entry, f"/metrics/{i}")
        ],
        findings=[_finding(entry, f"/findings/{i}") for i, entry in enumerate(findings)],
        dropped=_whole(data.get("dropped", 0), "/dropped"),
        items=len(frames) + len(metrics) + len(findings),
    )
    if len(batch.metrics) > MAX_BATCH_VALUES:
        _refuse("/metrics", f"at most {MAX_BATCH_VALUES} values in one batch")
    if batch.seq_to - batch.seq_from + 1 != batch.items or batch.seq_from < 1:
        _refuse("/seq_to", f"{batch.items} items are not {batch.seq_from}…{batch.seq_to}")
    return batch


def _entries(data: dict[str, Any], name: str, most: int) -> list[dict[str, Any]]:
    entries = data.get(name, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        _refuse(f"/{name}", "must be a list of objects")
    if len(entries) > most:
        _refuse(f"/{name}", f"at most {most} in one batch")
    return entries


def _frame(entry: dict[str, Any], where: str, layers: int) -> FrameItem:
    text = entry.get("values")
    try:
        raw = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        _refuse(f"{where}/values", "is not base64")
    expected = layers * len(SIGNALS) * 4
    if len(raw) != expected:
        _refuse(
            f"{where}/values",
            f"{layers} layers x {len(SIGNALS)} signals are {expected} bytes, got {len(raw)}",
        )
    return FrameItem(*_moment(entry, where), raw)


def _metrics(entry: dict[str, Any], where: str) -> Iterator[MetricItem]:
    step, wall_time = _moment(entry, where)
    values = entry.get("values")
    if not isinstance(values, dict) or len(values) > MAX_VALUES:
        _refuse(f"{where}/values", f"must be an object of at most {MAX_VALUES} numbers")
    for name, value in values.items():
        if not 0 < len(name) <= MAX_METRIC_NAME:
            _refuse(f"{where}/values", f"a metric's name has 1…{MAX_METRIC_NAME} characters")
        try:
            number = codec.number_from_wire(value)
        except CodecError as error:
            _refuse(f"{where}/values/{name}", str(error))
        yield MetricItem(step, wall_time, name, number)


def _finding(entry: dict[str, Any], where: str) -> dict[str, Any]:
    rule = _text(entry, "rule", where)
    if rule not in set(ViolationRule):
        _refuse(f"{where}/rule", f"is one of {', '.join(ViolationRule)}")
    severity = _text(entry, "severity", where)
    if severity not in set(Severity):
        _refuse(f"{where}/severity", f"is one of {', '.join(Severity)}")
    layer = _text(entry, "layer", where)
    if len(layer) > MAX_NAME_LENGTH:
        _refuse(f"{where}/layer", f"at most {MAX_NAME_LENGTH} characters")
    texts = {name: _text(entry, name, where)[:500] for name in ("observed", "limit", "remedy")}
    return {"rule": rule, "severity": severity, "layer": layer, **texts}


def _moment(entry: dict[str, Any], where: str) -> tuple[int, float]:
    step = _whole(entry.get("step"), f"{where}/step")
    wall_time = entry.get("wall_time")
    if (
        isinstance(wall_time, bool)
        or not isinstance(wall_time, int | float)
        or not (math.isfinite(wall_time) and 0 <= wall_time <= MAX_WALL_TIME)
    ):
        _refuse(f"{where}/wall_time", "must be seconds since the epoch")
    return step, float(wall_time)


def _text(entry: dict[str, Any], name: str, where: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str):
        _refuse(f"{where}/{name}", "must be a text")
    return value


def _whole(value: Any, where: str, most: int = MAX_STEP) -> int:
    if type(value) is not int or not 0 <= value <= most:
        _refuse(where, f"must be a whole number in 0…{most}")
    return value


def _refuse(pointer: str, why: str) -> NoReturn:
    raise Problem(
        400,
        "invalid",
        f"{pointer}: {why}.",
        errors=[{"pointer": pointer, "code": "invalid", "detail": why}],
    )
