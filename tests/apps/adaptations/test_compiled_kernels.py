"""Tier 1 on the server: requested after the graft, built, and offered where it is faster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.test import override_settings

from apps.adaptations import compiled_kernels
from apps.adaptations.models import Adaptation
from apps.kernels.models import Kernel, SpeedUp
from apps.kernels.selectors import speed_up_of
from apps.notifications.models import OutboxMessage
from apps.runs.models import Command, Run
from esper import compilation
from esper.compilation.bundle import pack
from esper.contracts import (
    AdaptationState,
    CommandKind,
    CommandState,
    CostForecast,
    KernelBundle,
    KernelDraft,
    KernelReport,
    KernelSpec,
    LayerInfo,
    RefusalCode,
    SpeedUpState,
)
from esper.exceptions import CompilerMissingError
from tests.apps.cast import CERTIFICATE, force_state
from tests.apps.stage import Stage

Grafted = Callable[[], Adaptation]


@pytest.fixture
def grafted(stage: Stage, settings: Any, tmp_path: Path, kernel_private_key: str) -> Grafted:
    """A graft in a run whose trainer takes machine code."""
    (tmp_path / "key").write_text(kernel_private_key)
    settings.ESPER_KERNEL_KEY_FILE = str(tmp_path / "key")
    settings.ESPER_KERNEL_STORE_DIR = tmp_path / "kernels"
    Run.objects.filter(pk=stage.run.pk).update(versions={"machine_code": "taken"})
    stage.run.refresh_from_db()

    def graft() -> Adaptation:
        adaptation = stage.grafted(stage.propose())
        adaptation.refresh_from_db()
        return adaptation

    return graft


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[float | Exception], None]:
    """Plays the compiler, which takes seconds: the files are signed, the code is a stand-in."""

    def plays(outcome: float | Exception) -> None:
        def build(
            layer: LayerInfo, slug: str, config: dict[str, Any], *, private_key: str
        ) -> KernelBundle:
            if isinstance(outcome, Exception):
                raise outcome
            key = compilation.compiled_key(layer, slug, config)
            report = KernelReport(
                CERTIFICATE, CostForecast(1, 1, 0.1, 0.1), tier=1, speedup=outcome
            )
            spec = KernelSpec(slug, key.blueprint_version, key.config, 7)
            return pack(KernelDraft(key, spec, report), private_key=private_key, code=b"code")

        monkeypatch.setattr(compilation, "build_compiled", build)

    return plays


def state_of(adaptation: Adaptation) -> SpeedUp:
    row = speed_up_of(adaptation.uid)
    assert row is not None
    return row


def build_and_offer(worker: str) -> bool:
    """The builder, without the key of commands, and then the control worker."""
    with override_settings(ESPER_COMMAND_KEY=""):
        built = compiled_kernels.build_next(worker=worker)
    for message in OutboxMessage.objects.filter(task=compiled_kernels.OFFER_TASK):
        assert message.queue == "control"
        compiled_kernels.offer(*message.args)
    return built


def speed_up_command(adaptation: Adaptation) -> Command | None:
    return Command.objects.filter(adaptation_uid=adaptation.uid, kind=CommandKind.SPEED_UP).first()


def test_a_faster_kernel_is_offered_after_the_graft_and_the_answer_is_kept(
    stage: Stage, grafted: Grafted, worker: Any
) -> None:
    adaptation = grafted()
    assert state_of(adaptation).state == SpeedUpState.QUEUED
    assert OutboxMessage.objects.filter(task=compiled_kernels.SPEED_UP_TASK).exists()
    worker(1.4)

    assert build_and_offer("compile@here")
    assert not compiled_kernels.build_next(worker="compile@here")

    command = speed_up_command(adaptation)
    assert command is not None
    assert Kernel.objects.get(digest=command.kernel_digest).tier == 1
    assert state_of(adaptation).state == SpeedUpState.OFFERED
    stage.ack(command, CommandState.ACCEPTED)
    stage.ack(command, CommandState.APPLIED, speedup=1.31, reason="compiled 1.31×, swapped in")
    row = state_of(adaptation)
    assert (row.state, row.speedup, row.worker_speedup) == (SpeedUpState.SWAPPED_IN, 1.31, 1.4)
    adaptation.refresh_from_db()
    assert adaptation.state == AdaptationState.PROBATION  # nothing else has changed


def test_what_the_trainer_finds_slower_is_kept_eager_and_said(
    stage: Stage, grafted: Grafted, worker: Any
) -> None:
    adaptation = grafted()
    worker(1.2)
    build_and_offer("w")
    command = speed_up_command(adaptation)
    assert command is not None

    stage.ack(
        command, CommandState.REFUSED, code=str(RefusalCode.NOT_FASTER), speedup=0.94,
        reason="compiled 0.94×, kept eager",
    )  # fmt: skip

    row = state_of(adaptation)
    assert (row.state, row.speedup) == (SpeedUpState.KEPT_EAGER, 0.94)
    assert row.text == "compiled 0.94×, kept eager"


def test_a_kernel_that_is_slower_on_the_worker_does_not_trouble_the_trainer(
    grafted: Grafted, worker: Any
) -> None:
    adaptation = grafted()
    worker(0.57)

    build_and_offer("w")

    assert speed_up_command(adaptation) is None
    row = state_of(adaptation)
    assert (row.state, row.worker_speedup) == (SpeedUpState.KEPT_EAGER, 0.57)
    assert "0.57×" in row.text


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (CompilerMissingError("no C++ compiler"), SpeedUpState.UNAVAILABLE),
        (MemoryError("out of memory"), SpeedUpState.FAILED),
    ],
)
def test_no_compiler_is_no_failure_and_a_failure_touches_no_adaptation(
    grafted: Grafted, worker: Any, outcome: Exception, state: SpeedUpState
) -> None:
    adaptation = grafted()
    worker(outcome)

    build_and_offer("w")

    assert state_of(adaptation).state == state
    adaptation.refresh_from_db()
    assert adaptation.state == AdaptationState.PROBATION


def test_nothing_is_compiled_for_a_trainer_that_runs_no_foreign_code(
    stage: Stage, grafted: Grafted
) -> None:
    Run.objects.filter(pk=stage.run.pk).update(versions={"torch": "2.13.0"})

    adaptation = grafted()

    assert speed_up_of(adaptation.uid) is None


def test_a_graft_that_has_gone_is_not_sped_up(stage: Stage, grafted: Grafted, worker: Any) -> None:
    adaptation = grafted()
    force_state(adaptation, AdaptationState.ROLLED_BACK)
    worker(1.5)

    build_and_offer("w")

    assert speed_up_command(adaptation) is None
    assert state_of(adaptation).state == SpeedUpState.KEPT_EAGER


def test_a_second_graft_of_the_same_shape_reuses_the_kernel(
    stage: Stage, grafted: Grafted, worker: Any
) -> None:
    adaptation = grafted()
    worker(1.2)
    build_and_offer("w")
    worker(AssertionError("built twice"))
    SpeedUp.objects.update(state=SpeedUpState.QUEUED)

    build_and_offer("w")

    assert state_of(adaptation).state == SpeedUpState.OFFERED
