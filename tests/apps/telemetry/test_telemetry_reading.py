"""Charts, heat map and thinning, against numbers counted by hand."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from django.utils import timezone

from apps.accounts.models import User
from apps.runs.models import Run
from apps.telemetry import services
from apps.telemetry.models import Frame, Metric
from apps.telemetry.selectors import metric_series
from esper.contracts import Role, RunState
from tests.apps.callers import Caller, Trainer, frame, metrics, register

pytestmark = pytest.mark.django_db


def test_a_long_series_keeps_its_extremes(trainer: Trainer, viewer: Caller) -> None:
    run = trainer.row()
    values = np.sin(np.arange(1000) / 50)
    values[500] = 40.0
    _store(run, values)
    series = viewer.get(f"{trainer.path}/metrics?name=loss&points=10").data
    assert len(series["step"]) == 10
    assert series["step"][-1] == 999
    assert max(series["max"]) == 40.0
    assert series["mean"][0] == pytest.approx(values[:100].mean())
    assert series["min"][3] == pytest.approx(values[300:400].min())


def test_increments_start_after_the_last_known_step(trainer: Trainer, viewer: Caller) -> None:
    _store(trainer.row(), np.arange(20.0))
    series = viewer.get(f"{trainer.path}/metrics?name=loss&after_step=17").data
    assert (series["step"], series["mean"]) == ([18, 19], [18.0, 19.0])


def test_increments_of_one_width_are_the_buckets_of_the_whole(
    trainer: Trainer, viewer: Caller
) -> None:
    run = trainer.row()
    values = np.random.default_rng(7).normal(size=1000)
    path = f"{trainer.path}/metrics?name=loss&width=16"
    _store(run, values[:503])
    before = viewer.get(path).data
    Metric.objects.all().delete()
    _store(run, values)
    whole = viewer.get(path).data
    known = 503 // 16  # complete buckets; the one after them is read again
    fresh = viewer.get(f"{path}&after_step={known * 16 - 1}").data
    for name in ("step", "min", "mean", "max"):
        assert before[name][:known] + fresh[name] == whole[name]
    assert (whole["width"], len(whole["step"])) == (16, 63)
    assert viewer.get(f"{trainer.path}/metrics?name=loss&points=10").data["width"] == 100
    assert viewer.get(f"{trainer.path}/metrics?name=loss&width=0").code == "invalid"


def test_a_metric_that_nobody_sent_is_empty(trainer: Trainer, viewer: Caller) -> None:
    series = viewer.get(f"{trainer.path}/metrics?name=accuracy").data
    assert (series["step"], series["non_finite"]) == ([], [])


@pytest.mark.parametrize("loss", ["nan", "inf", "-inf"])
def test_a_loss_that_is_no_number_is_said_by_the_api_and_by_exports(
    trainer: Trainer, viewer: Caller, loss: str
) -> None:
    """JSON has no such number; a row that kept it would break every reader of the list."""
    trainer.send(metrics=[metrics(10, loss=2.0), metrics(20, loss=loss)])
    series = viewer.get(f"{trainer.path}/metrics?name=loss").data
    assert series["non_finite"] == [{"step": 20, "value": loss}]
    assert series["mean"] == [2.0, None]
    assert viewer.get(trainer.path).data["last_loss"] == loss
    for kind in ("text/csv", "application/x-ndjson"):
        export = viewer.get("runs", Accept=kind)
        assert export.status == 200
        assert loss in b"".join(export.response.streaming_content).decode()


def test_huge_values_stay_finite_in_their_mean(trainer: Trainer) -> None:
    _store(trainer.row(), np.array([1.7e308, 1.7e308, 1.6e308]))
    series = metric_series(trainer.row(), "loss", points=1)
    assert np.isfinite(series["mean"][0])


def test_the_heat_map_shows_unknown_as_null(trainer: Trainer, viewer: Caller) -> None:
    trainer.send(frames=[frame(10, 0.25), frame(20, float("nan")), frame(30, 0.75)])
    heatmap = viewer.get(f"{trainer.path}/heatmap?signal=health&columns=50").data
    assert (heatmap["layers"], heatmap["step"]) == (["fc", "head"], [10, 20, 30])
    assert heatmap["values"] == [[0.25, None, 0.75], [0.25, None, 0.75]]
    narrow = viewer.get(f"{trainer.path}/heatmap?columns=2").data
    assert narrow["step"] == [10, 30]
    assert viewer.get(f"{trainer.path}/heatmap?signal=mood").code == "invalid"


def test_old_telemetry_is_thinned_and_thinning_again_changes_nothing(
    trainer: Trainer, settings: Any
) -> None:
    settings.ESPER_METRICS_KEPT = 100
    settings.ESPER_FRAMES_KEPT = 100
    run = trainer.row()
    values = np.ones(1000)
    values[3] = np.nan
    _store(run, values)
    Frame.objects.bulk_create(
        Frame(run=run, epoch=1, step=10 * i, wall_time=0.0, values=b"") for i in range(300)
    )
    assert services.thin_telemetry() > 0
    steps = list(Metric.objects.order_by("step").values_list("step", flat=True))
    assert steps[-100:] == list(range(900, 1000))
    assert 3 in steps  # where it diverged is never forgotten
    assert 140 <= len([step for step in steps if 600 <= step < 900]) <= 160
    assert 30 <= len([step for step in steps if step < 600]) <= 90
    assert 200 <= Frame.objects.count() <= 240
    assert services.thin_telemetry() == 0


def test_telemetry_of_runs_that_ended_long_ago_goes_and_their_runs_stay(
    trainer: Trainer, people: dict[Role, User], settings: Any
) -> None:
    old, recent = trainer.row(), register(people[Role.RESEARCHER], name="recent").row()
    for run, days in ((old, 31), (recent, 29)):
        _store(run, np.array([1.0, np.nan]))
        Frame.objects.create(run=run, epoch=1, step=1, wall_time=0.0, values=b"")
        ended_at = timezone.now() - timedelta(days=days)
        Run.objects.filter(pk=run.pk).update(ended_at=ended_at, state=RunState.FINISHED)
    assert services.thin_telemetry() == 0
    settings.ESPER_TELEMETRY_DAYS = 30
    assert services.thin_telemetry() == 3
    assert set(Metric.objects.values_list("run", flat=True)) == {recent.pk}
    assert set(Frame.objects.values_list("run", flat=True)) == {recent.pk}
    assert Run.objects.count() == 2


def test_the_growth_of_frames_says_when_the_disk_is_full(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "free_mib", lambda _: 1000)
    assert services.telemetry_growth().days_left is None
    now = time.time()
    size = 2**20 - services.ROW_BYTES
    Frame.objects.bulk_create(
        Frame(run=trainer.row(), epoch=1, step=i, wall_time=now - 20 + i, values=bytes(size))
        for i in range(20)
    )
    growth = services.telemetry_growth()  # 20 MiB in 20 seconds
    assert growth.mib_per_day == pytest.approx(86_400, rel=0.5)
    assert growth.days_left == pytest.approx(1000 / growth.mib_per_day)
    assert "1,000 MiB are free" in str(growth)


def test_progress_is_sent_at_most_four_times_a_second(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, django_capture_on_commit_callbacks: object
) -> None:
    sent: list[str] = []
    monkeypatch.setattr(services, "notify", lambda group, type, message: sent.append(type))
    with django_capture_on_commit_callbacks(execute=True):  # type: ignore[operator]
        for step in range(1, 6):
            trainer.send(metrics=[metrics(step, loss=1.0)])
    assert sent == ["feed.progress"]


def _store(run: Run, values: np.ndarray) -> None:
    Metric.objects.bulk_create(
        Metric(
            run=run,
            epoch=1,
            step=step,
            wall_time=float(step),
            name="loss",
            value=None if np.isnan(value) else value,
            status="nan" if np.isnan(value) else "",
        )
        for step, value in enumerate(values.tolist())
    )
