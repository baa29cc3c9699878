"""What makes Tamiyo look at a run again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from esper.contracts import SIGNALS, HealthFrame, LayerInfo, RunMode, RunSnapshot, SafetyPolicy
from esper.services.tamiyo.stream import HealthEntry
from esper.services.tamiyo.watch import RunWatch
from esper.services.tamiyo.wire import RunReport
from tests.esper.conftest import LACKS_CAPACITY

LAYER = LayerInfo("fc", "Linear", (8, 16), (8, 16), "float32", 272, graftable=True)


def report(losses: int) -> RunReport:
    frame = HealthFrame(100, 0.0, ("fc",), np.ones((1, len(SIGNALS)), dtype=np.float32))
    snapshot = RunSnapshot(
        run="run_1",
        epoch=1,
        mode=RunMode.AUTOMATIC,
        step=100,
        layers=(LAYER,),
        frames=(frame,),
        loss_steps=np.arange(losses, dtype=np.int64),
        loss=np.ones(losses),
        model_parameters=272,
    )
    return RunReport(snapshot=snapshot, limits=SafetyPolicy(), active=())


def test_a_frame_that_was_decided_on_with_half_of_its_losses_is_decided_on_again() -> None:
    watch = RunWatch("run_1")
    watch.take(report(losses=20))
    watch.undecided = False  # decided
    watch.take(report(losses=20))
    assert not watch.undecided
    watch.take(report(losses=100))
    assert watch.undecided


def test_a_finding_that_comes_after_the_last_frame_is_decided_on() -> None:
    watch = RunWatch("run_1")
    watch.take(report(losses=20))
    watch.undecided = False  # decided
    found = report(losses=20)
    found = replace(found, snapshot=replace(found.snapshot, findings=(LACKS_CAPACITY,)))
    watch.take(found)
    assert watch.undecided
    watch.undecided = False
    watch.take(found)
    assert not watch.undecided


def test_a_frame_that_comes_with_a_finding_needs_a_new_snapshot() -> None:
    watch = RunWatch("run_1")
    watch.take(report(losses=20))
    entry = HealthEntry(b"1-0", "run_1", 1, 110, 0.0, b"", None, stored_at=0.0)
    assert not watch.needs_snapshot([entry], max_age_seconds=60.0)
    assert watch.needs_snapshot([replace(entry, findings=1)], max_age_seconds=60.0)
