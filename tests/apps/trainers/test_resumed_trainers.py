"""A real trainer that resumes from a checkpoint, at a real server whose rows are newer."""

from __future__ import annotations

import pytest

from apps.adaptations.models import Adaptation
from apps.violations.models import Violation
from esper.contracts import AdaptationState
from tests.apps.trainers.lives import Lives, alive, judged, state_of, until
from tests.esper.sdk.tiny_training import grafts_at

S = AdaptationState

# On SQLite in memory, the server's threads and the test would share one connection and with it
# their transactions.
pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.postgres]


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
