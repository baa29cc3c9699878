"""The checker of the nemesis finds what is wrong with a history, and nothing in a good one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.nemesis.checker import hash_of, held_at_the_end, violations
from tests.nemesis.history import AdaptationRow, AuditRow, CommandRow, History
from tests.nemesis.installation import wrong_clock
from tests.nemesis.ledger import Ledger, read_ledger

START = datetime(2026, 1, 1, tzinfo=UTC)
RUN = "run_1"
KEPT = "proposed awaiting_approval approved compile_queued compiling compiled dispatched accepted "
KEPT += "probation kept"
ROLLED_BACK = KEPT.replace("kept", "rolling_back rolled_back")


class Story:
    """A good history of one run: A is kept, B is rolled back, C is rejected."""

    def __init__(self) -> None:
        self.history = History(live_runs={RUN}, journals={RUN: 4})
        self._second = 0
        self.say("start", held=[])
        for uid, states, seq in (("A", KEPT, 1), ("B", ROLLED_BACK, 2)):
            self.live(uid, states.split(), seq)
        self.live("C", ["proposed", "awaiting_approval", "rejected"], 0)
        self.command(3, "undo", "B")
        self.say("removed", adaptation="B")
        self.command(4, "keep", "A")
        self.seal()

    def live(self, uid: str, states: list[str], seq: int) -> None:
        for version, state in enumerate(states, start=1):
            self.record("adaptation." + state, uid, {"to": state, "version": version})
            if state == "dispatched":
                self.command(seq, "graft", uid)
            if state == "accepted":
                self.say("applied", adaptation=uid, seq=seq, epoch=1)
        row = AdaptationRow(uid=uid, run=RUN, state=states[-1], version=len(states))
        self.history.adaptations.append(row)

    def record(self, act: str, uid: str, data: dict[str, Any], kind: str = "adaptation") -> None:
        self._second += 1
        row = AuditRow(
            id=len(self.history.audit) + 1,
            at=START + timedelta(seconds=self._second),
            actor_kind="person",
            actor="olga",
            via="token",
            act=act,
            object_kind=kind,
            object_uid=uid,
            run_uid=RUN,
            reason="so, mit Umlaut: ä",
            data=data,
            previous_hash="",
            hash="",
        )
        self.history.audit.append(row)

    def command(self, seq: int, kind: str, uid: str) -> None:
        issued = (START + timedelta(seconds=self._second)).timestamp()
        row = CommandRow(
            run=RUN,
            epoch=1,
            seq=seq,
            kind=kind,
            adaptation=uid,
            issued_at=issued,
            expires_at=issued + 60,
            state="applied",
        )
        self.history.commands.append(row)
        self.say("command", seq=seq, epoch=1, kind=kind)

    def say(self, event: str, **members: Any) -> None:
        at = (START + timedelta(seconds=self._second)).timestamp()
        self.ledger.append({"at": at, "event": event, **members})

    @property
    def ledger(self) -> list[dict[str, Any]]:
        return self.history.ledgers.setdefault(RUN, [])

    def seal(self) -> None:
        """Chain the events as they are now."""
        previous = "0" * 64
        for index, row in enumerate(self.history.audit):
            row = replace(row, id=index + 1, previous_hash=previous)
            row = replace(row, hash=hash_of(row))
            self.history.audit[index], previous = row, row.hash
        self.history.audit_end = (len(self.history.audit), previous)

    def line(self, event: str, uid: str = "A") -> dict[str, Any]:
        """The first line of the ledger about it."""
        return next(
            line
            for line in self.ledger
            if line["event"] == event and line.get("adaptation", uid) == uid
        )

    def audited(self, act: str, uid: str = "A") -> int:
        """The place of an event in the audit log."""
        return next(
            place
            for place, row in enumerate(self.history.audit)
            if (row.act, row.object_uid) == ("adaptation." + act, uid)
        )

    def change_adaptation(self, uid: str, **changes: Any) -> None:
        rows = self.history.adaptations
        place = next(place for place, row in enumerate(rows) if row.uid == uid)
        rows[place] = replace(rows[place], **changes)


def test_a_good_history_has_no_violation() -> None:
    assert violations(Story().history) == []


def apply_twice(story: Story) -> None:
    story.ledger.append(story.line("applied"))


def apply_twice_in_two_lives(story: Story) -> None:
    story.say("start", held=[])
    story.ledger.append({**story.line("applied"), "epoch": 2})


def leave_without_end(story: Story) -> None:
    del story.history.audit[story.audited("kept") :]
    story.seal()
    story.change_adaptation("A", state="probation")


def forget_the_graft(story: Story) -> None:
    story.say("start", held=[])


def hold_what_was_rolled_back(story: Story) -> None:
    story.ledger.remove(story.line("removed", "B"))


def hold_what_nobody_knows(story: Story) -> None:
    story.say("start", held=["A", "Z"])


def apply_without_approval(story: Story) -> None:
    story.say("applied", adaptation="C", seq=1, epoch=1)


def apply_before_approval(story: Story) -> None:
    story.line("applied")["at"] = START.timestamp() - 60


def apply_to_another_run(story: Story) -> None:
    story.change_adaptation("A", run="run_2")


def apply_after_expiry(story: Story) -> None:
    story.line("applied")["at"] += 100


def apply_by_an_old_epoch(story: Story) -> None:
    story.line("applied")["epoch"] = 2


def apply_by_no_command(story: Story) -> None:
    story.line("applied")["seq"] = 77


def dispatch_after_the_kill(story: Story) -> None:
    story.record("switch.killed", "adaptation", {}, kind="switch")
    row = story.history.audit.pop()
    story.history.audit.insert(story.audited("dispatched"), row)
    story.seal()


def take_out_of_order(story: Story) -> None:
    lines = [line for line in story.ledger if line["event"] == "command"]
    lines[0]["seq"], lines[1]["seq"] = lines[1]["seq"], lines[0]["seq"]


def take_a_command_twice(story: Story) -> None:
    story.ledger.append(story.line("command"))


def lose_the_journal(story: Story) -> None:
    story.history.journals[RUN] = 1


def number_two_commands_alike(story: Story) -> None:
    story.history.commands[1] = replace(story.history.commands[1], seq=1)


def believe_what_was_never_done(story: Story) -> None:
    story.ledger.remove(story.line("applied"))
    story.say("start", held=["A"])


def change_an_event(story: Story) -> None:
    story.history.audit[3] = replace(story.history.audit[3], actor="carl")


def remove_an_event(story: Story) -> None:
    del story.history.audit[3]


def cut_the_end(story: Story) -> None:
    story.history.audit.pop()


def exchange_two_events(story: Story) -> None:
    audit = story.history.audit
    audit[3], audit[4] = audit[4], audit[3]


def skip_the_approval(story: Story) -> None:
    del story.history.audit[story.audited("approved")]
    story.seal()


def approve_after_a_rejection(story: Story) -> None:
    story.record("adaptation.approved", "C", {"to": "approved", "version": 4})
    story.seal()


def move_without_an_event(story: Story) -> None:
    story.change_adaptation("A", state="reverted")


def repeat_a_version(story: Story) -> None:
    story.history.audit[story.audited("kept")].data["version"] = 1
    story.seal()


def fail_what_was_taken_out(story: Story) -> None:
    """The answer to an undo came after its deadline."""
    story.record("adaptation.rollback_failed", "B", {"to": "rollback_failed", "version": 99})
    story.change_adaptation("B", state="rollback_failed")
    story.seal()


def fail_without_an_answer(story: Story) -> None:
    fail_what_was_taken_out(story)
    story.ledger.remove(story.line("removed", "B"))


def stay_quarantined(story: Story) -> None:
    story.history.quarantined.add(RUN)


def forget_the_quarantine(story: Story) -> None:
    fail_without_an_answer(story)


BAD: dict[Callable[[Story], None], str] = {
    apply_twice: "was applied 2 times",
    apply_twice_in_two_lives: "was applied 2 times",
    leave_without_end: "has no end",
    forget_the_graft: "its trainer does not hold it",
    hold_what_was_rolled_back: "its trainer holds it",
    hold_what_nobody_knows: "the server does not know it",
    apply_without_approval: "nobody has approved it",
    apply_before_approval: "before it was approved",
    apply_to_another_run: "whose adaptation it is not",
    apply_after_expiry: "after its command had expired",
    apply_by_an_old_epoch: "of another epoch",
    apply_by_no_command: "which does not exist",
    dispatch_after_the_kill: "after the kill",
    take_out_of_order: "took command 1 after 2",
    take_a_command_twice: "after 4",
    lose_the_journal: "its journal ends at 1",
    number_two_commands_alike: "two commands of one number",
    believe_what_was_never_done: "its trainer never did it",
    change_an_event: "was changed after it was written",
    remove_an_event: "event 4 is missing",
    cut_the_end: "were written",
    exchange_two_events: "is missing",
    skip_the_approval: "went from awaiting_approval to compile_queued",
    approve_after_a_rejection: "went from rejected to approved",
    move_without_an_event: "its last event says kept",
    repeat_a_version: "has version 1 after",
    fail_what_was_taken_out: "its trainer has taken it out",
    fail_without_an_answer: "no trainer has said so",
    stay_quarantined: "everything about it is known",
    forget_the_quarantine: "is not quarantined",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_a_bad_history_is_found(spoil: Callable[[Story], None]) -> None:
    story = Story()
    spoil(story)
    assert any(BAD[spoil] in found for found in violations(story.history)), violations(
        story.history
    )


def test_a_trainer_that_starts_again_holds_what_its_checkpoint_has() -> None:
    lines = [
        {"event": "start", "held": []},
        {"event": "applied", "adaptation": "A"},
        {"event": "checkpoint", "held": ["A"]},
        {"event": "applied", "adaptation": "B"},
        {"event": "start", "held": ["A"]},
        {"event": "removed", "adaptation": "A"},
    ]
    assert held_at_the_end(lines[:4]) == {"A", "B"}
    assert held_at_the_end(lines[:5]) == {"A"}
    assert held_at_the_end(lines) == set()


def test_a_process_may_have_a_wrong_clock_and_a_right_stop_watch() -> None:
    program = "import time; print(time.time(), time.monotonic())"
    environment = {**os.environ, **wrong_clock(seconds=3600)}
    answer = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    wall, watch = map(float, answer.stdout.split())
    assert 3500 < wall - time.time() <= 3600
    assert abs(watch - time.monotonic()) < 600


def test_a_line_that_a_crash_cut_off_is_skipped(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.write("start", held=[])
    with (tmp_path / "ledger").open("a") as file:
        file.write(json.dumps({"event": "applied"})[:9])
    assert [line["event"] for line in read_ledger(tmp_path / "ledger")] == ["start"]
