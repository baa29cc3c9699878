"""Losses that a hard undo took back measure neither the run nor its next graft."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from apps.adaptations import services
from apps.adaptations.models import Adaptation
from apps.adaptations.selectors import run_snapshot
from apps.console.curves import expected
from apps.runs.models import Run
from apps.telemetry.models import Frame, Metric
from apps.telemetry.selectors import losses_between
from apps.trainers import services as trainers
from esper.contracts import SIGNALS, CommandState, RemedyKind, ViolationRule
from esper.contracts.protocol import RemedyReport, Rollback
from esper.replay import run_snapshot as read
from tests.apps.cast import TRAINER
from tests.apps.stage import Stage

pytestmark = pytest.mark.django_db
GRAFT, UNDO, NOW = 120, 180, 240


def by_the_guard(stage: Stage, adaptation: Adaptation, back_to: int) -> None:
    report = Rollback(
        epoch=stage.run.epoch, adaptation=adaptation.uid, step=UNDO, rule=ViolationRule.NON_FINITE,
        observed="nan", limit="finite", exact=True, back_to_step=back_to,
    )  # fmt: skip
    trainers.record_local_rollback(run=stage.run, report=report, actor=TRAINER)


def by_a_person(stage: Stage, adaptation: Adaptation, back_to: int) -> None:
    services.roll_back_adaptation(
        adaptation=adaptation, user=stage.operator, via="test", version=adaptation.version,
        reason="odd",
    )  # fmt: skip
    details = {"back_to_step": back_to} if back_to >= 0 else {}
    stage.ack(stage.command(adaptation), CommandState.APPLIED, step=UNDO, details=details)


def by_the_script(stage: Stage, adaptation: Adaptation, back_to: int) -> None:
    report = RemedyReport(
        epoch=stage.run.epoch, key="k", remedy=RemedyKind.UNDO, layer="fc", step=UNDO, exact=True,
        adaptation=adaptation.uid, back_to_step=back_to,
    )  # fmt: skip
    trainers.record_remedy(run=stage.run, report=report, actor=TRAINER)


Way = Callable[[Stage, Adaptation, int], None]
WAYS: tuple[Way, ...] = (by_the_guard, by_a_person, by_the_script)


def measured(stage: Stage, first: int, last: int, loss: float, epoch: int = 1) -> None:
    at: dict[str, Any] = {"run": stage.run, "epoch": epoch}
    rows = [
        Metric(**at, step=step, wall_time=float(step), name="loss", value=loss)
        for step in range(first, last + 1)
    ]
    Metric.objects.bulk_create(rows)


def seen(stage: Stage) -> dict[int, float]:
    """Losses by step, as Tamiyo reads them for its decisions and verdicts."""
    found = read(run_snapshot(Run.objects.get(pk=stage.run.pk)))
    return dict(zip(found.loss_steps.tolist(), found.loss.tolist(), strict=True))


def graft_and_undo(stage: Stage, way: Way, back_to: int) -> Adaptation:
    """A graft lowers the loss to a tenth, and is taken out."""
    measured(stage, 1, GRAFT, 1.0)
    adaptation = stage.grafted(stage.propose())
    measured(stage, GRAFT + 1, UNDO, 0.1)
    way(stage, adaptation, back_to)
    measured(stage, UNDO + 1, NOW, 1.0)
    return adaptation


@pytest.mark.parametrize("way", WAYS)
def test_tamiyo_does_not_see_losses_that_were_taken_back(stage: Stage, way: Way) -> None:
    adaptation = graft_and_undo(stage, way, GRAFT)
    assert set(seen(stage).values()) == {1.0}
    assert len(seen(stage)) == GRAFT + NOW - UNDO
    # on its own page, and in the chart of the run, they are still what happened
    adaptation.refresh_from_db()
    _, losses = losses_between(adaptation.run, after_step=GRAFT, up_to_step=UNDO)
    assert set(losses.tolist()) == {0.1}


@pytest.mark.parametrize("way", WAYS)
def test_losses_of_a_soft_undo_are_the_runs_own(stage: Stage, way: Way) -> None:
    graft_and_undo(stage, way, -1)
    assert len(seen(stage)) == NOW


def test_a_frame_does_not_bring_such_a_loss_back(stage: Stage) -> None:
    values = bytes(4 * len(SIGNALS) * len(stage.run.layers))
    step = UNDO - 5
    Frame.objects.create(run=stage.run, epoch=1, step=step, wall_time=1.0, values=values, loss=0.1)
    graft_and_undo(stage, by_the_guard, GRAFT)
    Metric.objects.filter(step=step).delete()
    assert step not in seen(stage)


def test_the_next_graft_is_forecast_from_the_losses_that_are_left(stage: Stage) -> None:
    graft_and_undo(stage, by_a_person, GRAFT)
    Run.objects.filter(pk=stage.run.pk).update(step=NOW)
    adaptation = Adaptation.objects.get()
    adaptation.decided_step = NOW
    shown = expected(adaptation)
    assert shown is not None
    assert shown.loss == pytest.approx(1.0, abs=0.01)


def test_the_same_steps_of_a_later_start_count(stage: Stage) -> None:
    """The trainer went on from a checkpoint before the graft: these steps were made again."""
    graft_and_undo(stage, by_the_guard, GRAFT)
    Run.objects.filter(pk=stage.run.pk).update(epoch=2)
    measured(stage, 100, 200, 0.9, epoch=2)
    assert {step: seen(stage)[step] for step in (99, 100, 150, 200)} == {
        99: 1.0, 100: 0.9, 150: 0.9, 200: 0.9,
    }  # fmt: skip


@pytest.mark.parametrize("nonsense", [UNDO, UNDO + 1, -7])
def test_an_undo_to_no_earlier_step_takes_nothing_back(stage: Stage, nonsense: int) -> None:
    graft_and_undo(stage, by_a_person, nonsense)
    assert len(seen(stage)) == NOW
