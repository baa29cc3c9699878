"""A real trainer that resumes from a checkpoint, at a real server whose rows are newer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from django.utils import timezone

import esper
from apps.accounts.services import issue_token
from apps.adaptations import services
from apps.adaptations.models import Adaptation
from apps.policies.services import current_policy
from apps.runs.models import Run
from apps.violations.models import Violation
from esper import blueprints
from esper.contracts import AdaptationState, TokenScope, Verdict
from esper.sdk import attaching
from esper.sdk.adaptation import Operation
from esper.sdk.transport.queues import Pace
from tests.apps.cast import TAMIYO, TRAINER
from tests.apps.stage import Stage
from tests.esper.sdk.tiny_training import Training, grafts_at

S = AdaptationState

# On SQLite in memory, the server's threads and the test would share one connection and with it
# their transactions.
pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.postgres]


class Lives:
    """One run of several lives, each a trainer of its own."""

    def __init__(self, stage: Stage, server: str) -> None:
        self.stage = stage
        self._server = server
        scopes = [TokenScope.RUNS_CREATE]
        _, self._token = issue_token(
            owner=stage.owner, name="trainer", scopes=scopes, actor=TRAINER
        )
        self.sessions: list[esper.Session] = []

    def begin(self, state: dict[str, Any] | None = None) -> tuple[Training, esper.Session]:
        """Attached, resumed from ``state``, and its hello is answered."""
        training = Training()
        session = esper.attach(
            training.model,
            training.optimizer,
            scheduler=training.scheduler,
            run="lives",
            mode="automatic",
            server=self._server,
            token=self._token,
        )
        self.sessions.append(session)
        if state is not None:
            session.load_state_dict(state)
        training.run(1, session)
        for older in self.sessions[:-1]:  # it is told that it was replaced, and stops
            until(lambda older=older: not alive(older), "the older life gives up")
        until(lambda: sender_of(session) is not None, "its hello is answered")
        return training, session

    def graft(self, training: Training, session: esper.Session) -> Adaptation:
        """As a command would have it: in the model, and in probation on the server."""
        adaptation = Adaptation.objects.create(
            run=self.run,
            run_epoch=self.run.epoch,
            idempotency_key="lives",
            layer="3",
            adaptation_type="add_efficiency",
            blueprint=self.stage.blueprint,
            risk="low",
            forecast_parameters=1,
            policy="heuristic-1",
            safety_policy=current_policy(),
            proposed_step=1,
            graft_step=1,
            grafted_at=timezone.now(),
            state=S.PROBATION,
        )
        layer = next(layer for layer in session.layers if layer.name == "3")
        lora = blueprints.get_blueprint("proj_lora_64")
        session._surgery.apply(Operation(layer, lora, {}, seed=1, uid=adaptation.uid))
        training.run(3, session)
        return adaptation

    @property
    def run(self) -> Run:
        return Run.objects.get(name="lives")


def alive(session: esper.Session) -> bool:
    thread = session._server and session._server._transport._thread
    return thread is not None and thread.is_alive()


def sender_of(session: esper.Session) -> object:
    """The transport makes it once its hello was answered."""
    return session._server and session._server._transport._sender


def until(condition: Callable[[], object], what: str, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.02)


def judged(adaptation: Adaptation, *, keep: bool) -> Adaptation:
    verdict = Verdict(keep=keep, reason="as the test wants it")
    return services.judge_adaptation(
        adaptation=adaptation, verdict=verdict, reward_terms={}, actor=TAMIYO
    )


@pytest.fixture
def lives(
    stage: Stage, live_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Lives]:
    monkeypatch.setenv("ESPER_STATE_DIR", str(tmp_path))
    brisk = partial(Pace, flush=0.02, least_gap=0.0, first_retry=0.02, longest_retry=0.1)
    monkeypatch.setattr(attaching, "Pace", brisk)
    lives = Lives(stage, live_server.url)
    yield lives
    for session in lives.sessions:
        session.close()


def test_a_checkpoint_older_than_the_graft_ends_it(lives: Lives) -> None:
    training, session = lives.begin()
    older = session.state_dict()
    adaptation = lives.graft(training, session)
    _, resumed = lives.begin(older)
    adaptation.refresh_from_db()
    assert adaptation.state == S.ROLLED_BACK
    assert "without this graft" in adaptation.end_reason
    assert resumed.adaptations == ()


def test_a_graft_that_was_rolled_back_since_the_checkpoint_is_taken_out(lives: Lives) -> None:
    training, session = lives.begin()
    adaptation = lives.graft(training, session)
    saved = session.state_dict()
    judged(adaptation, keep=False)
    training.until(lambda: not session.adaptations[0].grafted, session)
    until(lambda: state_of(adaptation) == S.ROLLED_BACK, "the undo is answered")
    training, resumed = lives.begin(saved)
    training.until(lambda: not resumed.adaptations[0].grafted, resumed)
    assert not grafts_at(training.model, "3")
    assert state_of(adaptation) == S.ROLLED_BACK


def test_a_graft_that_was_kept_since_the_checkpoint_is_said_to_be(lives: Lives) -> None:
    training, session = lives.begin()
    adaptation = lives.graft(training, session)
    saved = session.state_dict()
    judged(adaptation, keep=True)
    training.until(lambda: session.adaptations[0].state is S.KEPT, session)
    training, resumed = lives.begin(saved)
    assert saved["applied"][0]["state"] == S.PROBATION
    training.until(lambda: resumed.adaptations[0].state is S.KEPT, resumed)
    assert state_of(adaptation) == S.KEPT
    assert not Violation.objects.exists()


def test_a_checkpoint_older_than_a_merge_holds_a_graft_that_can_be_taken_out(
    lives: Lives,
) -> None:
    training, session = lives.begin()
    adaptation = lives.graft(training, session)
    judged(adaptation, keep=True)
    training.until(lambda: session.adaptations[0].state is S.KEPT, session)
    saved = session.state_dict()
    receipt = session.adaptations[0].receipt
    assert receipt is not None
    session.merge(receipt)
    until(lambda: Adaptation.objects.get(pk=adaptation.pk).merged_at, "the merge is reported")
    lives.begin(saved)
    adaptation.refresh_from_db()
    assert (adaptation.state, adaptation.merged_at) == (S.KEPT, None)


def test_grafts_that_the_run_never_had_are_a_violation(lives: Lives) -> None:
    training, session = lives.begin()
    adaptation = lives.graft(training, session)
    saved = session.state_dict()
    Adaptation.objects.filter(pk=adaptation.pk).delete()
    for _ in range(2):
        _, resumed = lives.begin(saved)
        assert resumed.adaptations[0].grafted
    violation = Violation.objects.get(run=lives.run)
    assert violation.observed == "proj_lora_64 at 3"
    assert "never had" in violation.text


def test_a_run_that_is_resumed_twice_belongs_to_the_later_process(
    lives: Lives, caplog: pytest.LogCaptureFixture
) -> None:
    _, session = lives.begin()
    saved = session.state_dict()
    first_training, first = lives.begin(saved)
    _, second = lives.begin(saved)
    assert lives.run.epoch == 3
    first_training.run(5, first)  # trains on without a report
    assert not alive(first)
    assert "same name" in caplog.text
    assert alive(second)
    assert first.run == second.run


def state_of(adaptation: Adaptation) -> str:
    return Adaptation.objects.get(pk=adaptation.pk).state
