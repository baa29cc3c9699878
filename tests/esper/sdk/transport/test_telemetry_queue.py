"""The queue between training and transport: bounded, exact about losses, in order."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts import SIGNALS, HealthFrame, codec, protocol, telemetry_body, wire
from esper.sdk.transport import telemetry
from esper.sdk.transport.telemetry import TelemetryQueue


def frame(step: int, layers: int = 2) -> HealthFrame:
    values = np.full((layers, len(SIGNALS)), np.nan, dtype=np.float32)
    names = tuple(f"layer{i}" for i in range(layers))
    return HealthFrame(step=step, wall_time=0.0, layers=names, values=values)


@given(st.lists(st.sampled_from(["metric", "take", "refuse"]), min_size=1, max_size=200))
def test_offered_is_stored_plus_dropped_plus_waiting(acts: list[str]) -> None:
    queue = TelemetryQueue()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(telemetry, "MAX_WAITING_METRICS", 5)
        reported = 0
        for step, act in enumerate(acts):
            if act == "metric":
                queue.offer_metrics(step, 0.0, {"loss": 1.0})
                continue
            batch = queue.take(1)
            if batch is None:
                continue
            if act == "take":
                reported += batch.message.dropped
                queue.settle_stored(batch)
            else:
                queue.settle_dropped(batch)
        assert queue.offered == queue.stored + queue.dropped + len(queue)
        last = TelemetryQueue.take(queue, 1)
        if last is not None:
            reported += last.message.dropped
            assert reported == queue.dropped  # every loss is reported once


def test_batches_are_numbered_without_gaps() -> None:
    queue = TelemetryQueue()
    expected = 1
    for size in (3, 1, 600):
        for step in range(size):
            queue.offer_metrics(step, 0.0, {"loss": 1.0})
        while (batch := queue.take(1)) is not None:
            assert batch.message.seq_from == expected
            assert batch.message.seq_to == expected + batch.items - 1
            expected += batch.items
            queue.settle_stored(batch)
    assert expected == 605


def test_a_batch_holds_no_more_values_than_a_server_takes() -> None:
    queue = TelemetryQueue()
    for step in range(500):
        queue.offer_metrics(step, 0.0, {f"metric_{number}": 1.0 for number in range(60)})
    sizes = []
    while (batch := queue.take(1)) is not None:
        sizes.append(sum(len(entry.values) for entry in batch.message.metrics))
        queue.settle_stored(batch)
    assert max(sizes) < 20_000
    assert sum(sizes) == 30_000


def test_a_diverged_loss_travels_as_strict_json() -> None:
    queue = TelemetryQueue()
    queue.offer_metrics(1, 0.0, {"loss": math.nan, "grad_norm": math.inf})
    batch = queue.take(1)
    assert batch is not None
    content, media_type = batch.content(raw=False)
    assert media_type == "application/json"
    sent = codec.decode(content)
    assert sent["metrics"][0]["values"] == {"loss": "nan", "grad_norm": "inf"}


def test_raw_bodies_hold_what_json_bodies_hold() -> None:
    queue = TelemetryQueue()
    queue.offer_frame(frame(1))
    queue.offer_frame(replace(frame(2), values=np.ones((2, len(SIGNALS)), dtype=np.float32)))
    queue.offer_metrics(2, 0.0, {"loss": math.nan})
    batch = queue.take(1)
    assert batch is not None
    as_json = codec.decode(batch.content(raw=False)[0])
    content, media_type = batch.content(raw=True)
    assert media_type == telemetry_body.MEDIA_TYPE
    sent = telemetry_body.decode_body(content)
    assert repr(wire.from_wire(protocol.Telemetry, sent)) == repr(batch.message)
    assert repr(wire.from_wire(protocol.Telemetry, as_json)) == repr(batch.message)


def test_frames_of_the_largest_model_fit_the_largest_body() -> None:
    queue = TelemetryQueue()
    for step in range(10):
        queue.offer_frame(frame(step, layers=5_000))
    for step in range(2_000):
        queue.offer_metrics(step, 0.0, {"loss": 0.123456789, "accuracy": 0.987654321})
    sizes = []
    while (batch := queue.take(1)) is not None:
        sizes.append(len(batch.content(raw=False)[0]))
        assert len(batch.content(raw=True)[0]) <= telemetry_body.MAX_BYTES
        queue.settle_stored(batch)
    assert max(sizes) <= codec.MAX_BYTES
    assert queue.stored == 2_010


@pytest.mark.parametrize(("loss", "sent"), [(0.5, 0.5), (math.nan, "nan"), (None, None)])
def test_a_frame_carries_the_loss_of_its_step(loss: float | None, sent: object) -> None:
    queue = TelemetryQueue()
    values = np.zeros((1, len(SIGNALS)), dtype=np.float32)
    own = {} if loss is None else {"loss": loss}
    queue.offer_frame(HealthFrame(7, 1.0, ("fc",), values, own))
    batch = queue.take(1)
    assert batch is not None
    (found,) = codec.decode(batch.content(raw=False)[0])["frames"]
    assert (found["step"], found["loss"]) == (7, sent)
