"""What the decision page draws: the question, the forecast, and the probation."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from apps.adaptations.models import Adaptation
from apps.console.curves import expected, like_cases, probation
from apps.console.drawing import Mark, curve
from apps.runs.models import Run
from apps.telemetry.models import Metric
from esper.contracts import AdaptationState as S

WAY_TO_PROBATION = (
    *(S.APPROVED, S.COMPILE_QUEUED, S.COMPILING, S.COMPILED, S.DISPATCHED, S.ACCEPTED),
    S.PROBATION,
)


def panel(world: Any, adaptation: Adaptation, name: str) -> str:
    address = f"/adaptations/{adaptation.uid}?panel={name}"
    return str(world.client("olga").get(address).content.decode())


def add_steps(run: Run, steps: int, *, loss: float) -> None:
    """The run trains on."""
    Metric.objects.bulk_create(
        Metric(run=run, epoch=1, step=run.step + i, wall_time=0.0, name="loss", value=loss)
        for i in range(1, steps + 1)
    )
    Run.objects.filter(pk=run.pk).update(step=run.step + steps)


def test_the_question_is_drawn_with_loss_and_layer(world: Any) -> None:
    text = panel(world, world.adaptations["waiting"], "curves")
    said = re.findall(r'role="img" aria-label="([^"]*)"', text)
    assert [words.split(" from ")[0] for words in said] == [
        "loss",
        "health of the layer",
        "dead fraction of the layer",
    ]
    assert all("asked at step 80" in words for words in said)


def test_the_drawing_of_a_decided_question_stays_when_the_run_goes_on(world: Any) -> None:
    rejected = world.adaptations["rejected"]
    Adaptation.objects.filter(pk=rejected.pk).update(decided_step=100)
    before = panel(world, rejected, "curves"), panel(world, rejected, "forecast")
    assert "decided at step 100" in before[0]
    add_steps(rejected.run, 40, loss=90.0)
    assert (panel(world, rejected, "curves"), panel(world, rejected, "forecast")) == before


def test_the_forecast_names_its_interval_and_how_many_like_cases_it_has(world: Any) -> None:
    waiting = world.adaptations["waiting"]
    found = expected(waiting)
    assert found is not None
    assert 0.0 < found.low < found.loss < found.high < 0.6
    assert (found.like.count, found.like.few) == (1, True)
    assert "unknown: only 1 similar case of mlp_gelu_2048" in panel(world, waiting, "forecast")
    kept = world.adaptations["kept"]
    for place, gain in enumerate((0.01, 0.02, 0.03, 0.04)):
        kept.pk, kept.uid, kept.idempotency_key = None, f"adp_{place}", str(place)
        kept.forecast_gain = gain
        kept.save(force_insert=True)
    newest = Adaptation.objects.order_by("-pk")[0]
    newest.pk += 1
    assert like_cases(newest).middle == pytest.approx(0.03)


def test_probation_has_its_step_its_gain_and_its_limits(world: Any) -> None:
    graft = world.adaptations["waiting"]
    for state in WAY_TO_PROBATION:
        Adaptation.objects.filter(pk=graft.pk).update(state=state, graft_step=graft.run.step)
    policy = graft.safety_policy.safety_policy()
    since = policy.maturity_steps + 60
    add_steps(graft.run, since, loss=0.05)
    Metric.objects.create(
        run=graft.run,
        epoch=1,
        step=150,
        wall_time=0.0,
        name=f"ablation_gain:{graft.uid}",
        value=0.07,
    )
    graft = Adaptation.objects.get(pk=graft.pk)
    found = probation(graft)
    assert found is not None
    assert (found.steps, found.of) == (since, policy.probation_steps)
    assert found.level == pytest.approx(0.05)
    assert (found.gain or 0.0) > 0.1
    assert (found.limit or 0.0) > (found.forecast or math.inf)
    text = panel(world, graft, "probation")
    for words in (
        f"Step <strong>{since}</strong> of {found.of}",
        "+0.0700",
        "the graft is taken out",
    ):
        assert words in text
    for drawn in ('class="limit"', 'class="band"'):
        assert drawn in text


def test_a_curve_breaks_at_gaps_and_marks_what_it_shows() -> None:
    found = curve("x", [0, 1, 2, 3], [1.0, None, 2.0, 3.0], marks=[Mark(2, "asked"), Mark(9, "no")])
    assert found is not None
    assert len(found.lines) == 2
    assert [mark.word for mark in found.marks] == ["asked"]
    assert curve("x", [0, 1], [None, 1.0]) is None


def test_the_timeline_is_filtered_and_the_axis_of_the_charts_is_not(world: Any) -> None:
    client = world.client("olga")
    run = f"/runs/{world.runs['digits-cnn'].uid}?panel=timeline"
    whole = client.get(run).content.decode()
    markers = whole.split('id="markers"')[1].split("</script>")[0]
    assert "/adaptations/" in whole.split("</script>")[1]
    for shown, absent in (("findings", "/adaptations/adp"), ("adaptations", "#vio_")):
        text = client.get(f"{run}&show={shown}").content.decode()
        assert text.split('id="markers"')[1].split("</script>")[0] == markers
        assert absent not in text.split("</script>")[1], shown
    assert client.get(f"{run}&show=nothing").status_code == 404
