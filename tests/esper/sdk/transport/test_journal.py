"""The journal survives crashes, only its owner can read it, and answered reports leave it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from esper.sdk.transport.journal import Journal


def opened(folder: Path) -> Journal:
    journal = Journal(folder)
    journal.start_epoch(run="r1", epoch=1, server="http://s", token="esp_secret")
    return journal


def abandoned(journal: Journal) -> None:
    """Closed as by a kill: nothing is tidied up."""
    journal._file.close()


def test_reports_and_commands_survive_a_kill(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    first = journal.add_report("runs/r1/commands/1/ack", {"seq": 1})
    journal.add_report("runs/r1/commands/2/ack", {"seq": 2})
    journal.take_command(2)
    journal.remove_report(first)
    abandoned(journal)

    again = Journal(tmp_path)

    assert [report.body for report in again.reports] == [{"seq": 2}]
    assert again.state.command_seq == 2
    assert (again.state.run, again.state.server, again.state.token) == (
        "r1",
        "http://s",
        "esp_secret",
    )
    again.close()


def test_every_cut_of_the_file_is_readable(tmp_path: Path) -> None:
    journal = opened(tmp_path / "whole")
    for seq in range(1, 4):
        journal.add_report(f"commands/{seq}/ack", {"seq": seq})
    path = journal.path
    abandoned(journal)
    whole = path.read_bytes()

    for cut in range(len(whole)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / path.name).write_bytes(whole[:cut])
        torn = Journal(folder)
        held = [report.body["seq"] for report in torn.reports]
        assert held == [1, 2, 3][: len(held)]
        torn.add_report("commands/9/ack", {"seq": 9})
        abandoned(torn)
        healed = Journal(folder)
        assert [report.body["seq"] for report in healed.reports] == [*held, 9]
        abandoned(healed)


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    assert stat.S_IMODE(os.stat(journal.path).st_mode) == 0o600
    journal.close()


def test_a_running_process_locks_its_journal(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    with pytest.raises(BlockingIOError):
        Journal(tmp_path)
    journal.close()


def test_a_journal_without_unanswered_reports_is_removed(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.remove_report(journal.add_report("finish", {}))
    journal.close()
    assert not journal.path.exists()


def test_numbers_of_reports_are_never_used_twice(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    first = journal.add_report("a", {})
    journal.remove_report(first)
    abandoned(journal)
    again = opened(tmp_path)
    assert again.add_report("b", {}).number > 0
    assert len(again.reports) == 1
    again.close()
