"""``esper approve`` and its neighbours: evidence first, its hash is sent, exit statuses."""

from __future__ import annotations

import json
import re

import pytest

from apps.accounts.models import User
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from esper.contracts import AdaptationState, Role
from launcher.remote.client import Exit
from tests.apps.callers import Inbox
from tests.apps.commands.terminal import Terminal

pytestmark = pytest.mark.django_db


def test_an_approval_shows_the_evidence_and_sends_its_hash(
    inbox: Inbox, terminal: Terminal
) -> None:
    waiting = inbox.waiting()
    done = terminal.run("approve", f"A-{waiting.number}", "--yes", "--reason", "it helps")
    assert done.exit_code == 0, done.output
    assert "then → now" in done.output
    shown = " ".join(done.output.split())
    assert all(c["text"] in shown for c in waiting.checks if not c["passed"])
    assert re.search(r"then → now [a-z ]+ [-?\d.e+]+ → [-\d.e+]+", shown)
    assert waiting.evidence_hash[:12] in done.output
    waiting.refresh_from_db()
    assert waiting.state == AdaptationState.COMPILE_QUEUED
    assert (waiting.decided_by and waiting.decided_by.username) == "olga"
    event = AuditEvent.objects.filter(act="adaptation.approved").get()
    assert event.via.startswith("token")
    sent = json.loads(terminal.requests[-1].content)
    assert sent["evidence_hash"] == waiting.evidence_hash


def test_an_approval_is_not_sent_without_an_answer(inbox: Inbox, terminal: Terminal) -> None:
    waiting = inbox.waiting()
    refused = terminal.run("approve", waiting.uid)
    assert (refused.exit_code, "--yes" in refused.output) == (2, True)
    assert all(request.method == "GET" for request in terminal.requests)


def test_the_list_shows_what_waits_and_a_rejection_empties_it(
    inbox: Inbox, terminal: Terminal
) -> None:
    waiting = inbox.waiting()
    assert [row["uid"] for row in terminal.read("inbox")] == [waiting.uid]
    assert waiting.title in terminal.run("inbox", "--run", "digits").output
    assert terminal.run("reject", waiting.uid, "--yes", "--reason", "no").exit_code == 0
    assert terminal.read("inbox") == []
    assert terminal.read("adaptations", "--state", "rejected")[0]["decision_reason"] == "no"


def test_a_second_decision_is_a_conflict_and_names_the_first(
    inbox: Inbox, terminal: Terminal
) -> None:
    waiting = inbox.waiting()
    assert terminal.run("reject", waiting.uid, "--yes", "--reason", "no").exit_code == 0
    late = terminal.run("approve", waiting.uid, "--yes")
    assert late.exit_code == Exit.CONFLICT
    assert "olga" in late.output


def test_exit_statuses_tell_what_was_wrong(
    inbox: Inbox, terminal: Terminal, viewers_terminal: Terminal, people: dict[Role, User]
) -> None:
    waiting = inbox.waiting()
    assert terminal.run("show", "A-999").exit_code == Exit.NOT_FOUND
    assert terminal.run("show", "no-such-run").exit_code == Exit.NOT_FOUND
    refused = viewers_terminal.run("reject", waiting.uid, "--yes", "--reason", "no")
    assert refused.exit_code == Exit.NOT_ALLOWED
    assert terminal.run("reject", waiting.uid).exit_code == 2  # --reason is missing


def test_a_dry_run_checks_everything_and_changes_nothing(inbox: Inbox, terminal: Terminal) -> None:
    waiting = inbox.waiting()
    events = AuditEvent.objects.count()
    would = terminal.run("approve", waiting.uid, "--dry-run")
    assert (would.exit_code, "would be compile queued" in would.output) == (0, True)
    assert terminal.run("pause", "digits", "--dry-run").exit_code == 0
    assert terminal.run("kill", "--dry-run").exit_code == 0
    assert AuditEvent.objects.count() == events
    assert Adaptation.objects.get().version == waiting.version
    assert terminal.run("rollback", waiting.uid, "--reason", "r", "--dry-run").exit_code == 5


def test_acts_on_runs_reach_the_trainer(inbox: Inbox, terminal: Terminal) -> None:
    run = inbox.trainer.row()
    assert "was asked" in terminal.run("pause", f"R-{run.number}", "--reason", "look").output
    run.refresh_from_db()
    assert run.adaptation_paused_by == "olga"
    late = terminal.run("resume", "digits", "--wait", "--timeout", "0")
    assert late.exit_code == Exit.TIMEOUT
    assert terminal.run("kill").exit_code == 0
    assert terminal.run("resume", run.uid).exit_code == Exit.CONFLICT
    assert "is on" in terminal.run("kill", "--off").output
