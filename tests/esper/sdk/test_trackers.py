"""Events in the user's trackers: markers, numbers and links; broken and slow ones do no harm.

TensorBoard is the real one. W&B, MLflow and Trackio are fakes with the calls of their own clients.
"""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.exceptions import ConfigurationError
from esper.sdk.tracking import MAX_FAILURES, Event, Mirror, Progress, trackers_of

GRAFT = Event(7, "graft", "proj_lora_64 into 'fc'", "http://esper/adaptations/adp_1")
KEPT = Event(9, "kept", "proj_lora_64 in 'fc'", "http://esper/adaptations/adp_1", {"gain": 0.25})


class Memory:
    """A tracker of one's own."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = False

    def write(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed = True


class Watcher(Memory):
    """A tracker that takes the progress too."""

    def __init__(self) -> None:
        super().__init__()
        self.progress: list[Progress] = []
        self.told = threading.Event()

    def report(self, progress: Progress) -> None:
        self.progress.append(progress)
        self.told.set()


def _mirrored(*trackers: Any) -> Mirror:
    mirror = Mirror(trackers_of(trackers))
    for event in (GRAFT, KEPT):
        mirror.send(event)
    mirror.close()
    return mirror


def test_tensorboard_holds_markers_gains_and_the_link(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    _mirrored(writer)
    writer.add_scalar("loss", 1.0, 10)  # the user's writer is still open
    writer.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    (gain,) = read.Scalars("esper/gain")
    assert (gain.step, gain.value) == (9, 0.25)
    assert [point.step for point in read.Scalars("esper/graft")] == [7]
    (text,) = read.Tensors("esper/kept/text_summary")
    assert b"http://esper/adaptations/adp_1" in text.tensor_proto.string_val[0]
    assert read.Scalars("loss")


def test_wandb_gets_rows_that_do_not_move_its_own_step() -> None:
    rows: list[tuple[dict[str, Any], bool]] = []
    run = SimpleNamespace(
        log=lambda row, commit=True: rows.append((row, commit)), define_metric=lambda *_: None
    )
    _mirrored(run)
    assert [commit for _, commit in rows] == [False, False]
    assert rows[1][0]["esper/gain"] == 0.25
    assert rows[1][0]["esper/step"] == 9
    assert "http://esper/adaptations/adp_1" in rows[0][0]["esper/event"]


def test_mlflow_gets_metrics_tags_and_one_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class MlflowClient:
        def log_metric(self, run_id: str, key: str, value: float, *, step: int) -> None:
            calls.append(("metric", run_id, key, value, step))

        def set_tag(self, run_id: str, key: str, value: str) -> None:
            calls.append(("tag", run_id, key, value))

        def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
            calls.append(("text", run_id, text, artifact_file))

    fake = ModuleType("mlflow")
    active = SimpleNamespace(info=SimpleNamespace(run_id="r1"))
    fake.__dict__.update(MlflowClient=MlflowClient, active_run=lambda: active)
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    _mirrored("mlflow")
    assert ("metric", "r1", "esper/gain", 0.25, 9) in calls
    assert any(call[:3] == ("tag", "r1", "esper.kept") for call in calls)
    assert calls[-1][0] == "text"
    fake.__dict__["active_run"] = lambda: None
    with pytest.raises(ConfigurationError, match="start_run"):
        trackers_of(["mlflow"])


def test_trackio_gets_rows_at_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[dict[str, Any], int]] = []
    fake = ModuleType("trackio")
    fake.__dict__["log"] = lambda row, step: rows.append((row, step))
    monkeypatch.setitem(sys.modules, "trackio", fake)
    _mirrored("trackio")
    assert [(row["esper/event"][:4], step) for row, step in rows] == [("proj", 7), ("proj", 9)]


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(Memory):
        def write(self, event: Event) -> None:
            super().write(event)
            raise OSError("no network")

    broken, good = Broken(), Memory()
    mirror = Mirror([broken, good])
    with caplog.at_level(logging.WARNING, "esper"):
        for step in range(10):
            mirror.send(Event(step, "graft", "x"))
        mirror.close()
    assert (len(broken.events), len(good.events)) == (MAX_FAILURES, 10)
    assert good.closed
    assert "Broken: no network" in caplog.text


def test_a_tracker_that_hangs_delays_nothing() -> None:
    release = threading.Event()

    class Hanging(Memory):
        def write(self, event: Event) -> None:
            release.wait()

    mirror = Mirror([Hanging()])
    for step in range(1500):  # more than wait for it; the rest is dropped
        mirror.send(Event(step, "graft", "x"))
    assert mirror.dropped >= 400
    mirror.close(timeout=0.01)
    release.set()


def test_what_is_no_tracker_is_refused_and_a_missing_package_is_not(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match=r"did you mean.*tensorboard"):
        trackers_of(["tensorbord"])
    with pytest.raises(ConfigurationError, match="must be a list"):
        trackers_of("wandb")
    with pytest.raises(ConfigurationError, match="int is no tracker"):
        trackers_of([3])
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert trackers_of(["wandb"]) == []
    assert "not mirrored into wandb" in caplog.text


def test_a_run_mirrors_its_grafts_and_findings() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    frozen = nn.Linear(2, 2)
    model.extra = frozen  # is in no group of the optimizer: a finding
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.01)
    seen = Watcher()
    session = esper.attach(
        model, optimizer, mode="supervised", trackers=[seen], target_steps=12, verbose=False
    )
    x, y = torch.randn(16, 4), torch.randn(16, 1)
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model[2](model[1](model[0](x))), y)
        loss.backward()
        optimizer.step()
        session.step(loss)
    session.graft("0", "proj_lora_64")
    session.set_lr("2", 0.5)
    session.close()
    kinds = [event.kind for event in seen.events]
    assert {"graft", "remedy"} <= set(kinds)
    assert "finding" in kinds
    assert seen.closed
    assert seen.progress[-1].step == 3
    assert seen.progress[-1].target_steps == 12
    assert seen.progress[-1].loss == pytest.approx(loss.item())
    graft = seen.events[kinds.index("graft")]
    assert (graft.step, "proj_lora_64 into '0'" in graft.text) == (3, True)


def test_the_progress_is_told_without_events_and_ends_with_a_run_that_was_dropped() -> None:
    class Run:
        step = 5

        def progress(self) -> Progress:
            return Progress(self.step)

    run, seen = Run(), Watcher()
    mirror = Mirror([seen], seconds=0.01)
    mirror.follow(run.progress)
    assert seen.told.wait(600)
    seen.told.clear()
    assert seen.told.wait(600)  # again, although nothing happened
    del run
    mirror.close(60)
    assert seen.closed
    assert {progress.step for progress in seen.progress} == {5}


def test_the_environment_names_trackers_where_the_script_names_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ESPER_TRACKERS", "kubeflow, ")
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    assert trackers_of(None) == []
    assert "not mirrored into kubeflow: KUBEFLOW_TRAINER_SERVER_URL" in caplog.text
    caplog.clear()
    assert trackers_of([]) == []  # the script wants none
    assert not caplog.text
    monkeypatch.setenv("ESPER_TRACKERS", "kubflow")
    with pytest.raises(ConfigurationError, match=r"did you mean.*kubeflow"):
        trackers_of(None)
