"""``python -m tests.nemesis.mutants``: does a test turn red when a safety rule is broken?

Each rule is broken in turn in a copy of the code, and the tests that stand beside it are run there.
A mutant that no test notices has survived. ``--write`` puts the table into
``docs/reliability.md``.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import shutil
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from hosts.paths import ROOT
from tests.nemesis.page import read_section, write_section

COPIED = (
    *("apps", "esper", "esper_web", "hosts", "launcher", "templates", "locale", "tests", "static"),
)
PRELOADED = (
    *("torch", "numpy", "django", "rest_framework", "drf_spectacular", "celery", "channels"),
    *("httpx", "uvicorn", "redis", "websockets", "msgspec"),
)
CRASHED = 99
FAILED = 1  # pytest: some tests failed; every other status is a fault of the mutant or the test

LIFECYCLE = "apps/adaptations/test_adaptation_lifecycle.py::"
LATE = "apps/trainers/test_late_answers.py::"
COMMANDS = "esper/sdk/transport/test_commands_from_a_server.py::"
BAD_COMMAND = COMMANDS + "test_a_bad_command_is_refused_with_its_code_and_the_model_is_untouched"


@dataclass(frozen=True)
class Mutant:
    """A broken rule: in ``file``, ``old`` becomes ``new``; ``tests`` must notice."""

    rule: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "compare state and version before a change (both)",
        "apps/adaptations/lifecycle.py",
        "pk=adaptation.pk, state=came_from, version=adaptation.version, **only_if",
        "pk=adaptation.pk, **only_if",
        (LIFECYCLE + "test_a_row_that_changed_without_changing_its_state_is_not_moved",),
    ),
    Mutant(
        "compare state and version before a change (version)",
        "apps/adaptations/lifecycle.py",
        "state=came_from, version=adaptation.version, **only_if",
        "state=came_from, **only_if",
        (LIFECYCLE + "test_a_row_that_changed_without_changing_its_state_is_not_moved",),
    ),
    Mutant(
        "only transitions of the lifecycle",
        "apps/adaptations/lifecycle.py",
        "if to not in NEXT[came_from]:",
        "if False:",
        (
            LIFECYCLE
            + "test_a_transition_that_the_lifecycle_does_not_have_is_refused_before_the_database",
        ),
    ),
    Mutant(
        "an approval before its deadline, by the clock of the database",
        "apps/adaptations/acts.py",
        '_BEFORE_THE_DEADLINE = {"deadline_at__gt": Now()}',
        '_BEFORE_THE_DEADLINE = {"deadline_at__isnull": False}',
        (LIFECYCLE + "test_the_deadline_is_judged_by_the_clock_of_the_database",),
    ),
    Mutant(
        "an approval names the hash of what was shown",
        "apps/adaptations/acts.py",
        "if evidence_hash != adaptation.evidence_hash:",
        "if False:",
        (LIFECYCLE + "test_what_was_shown_must_be_what_is_approved",),
    ),
    Mutant(
        "the row that is approved is the row that was proposed",
        "apps/adaptations/acts.py",
        "if shown_hash(adaptation) != adaptation.evidence_hash:",
        "if False:",
        (LIFECYCLE + "test_a_row_that_was_changed_in_the_database_cannot_be_approved",),
    ),
    Mutant(
        "an approval is for this start of the trainer",
        "apps/adaptations/acts.py",
        "if adaptation.run_epoch != adaptation.run.epoch:",
        "if False:",
        (LIFECYCLE + "test_a_proposal_to_a_trainer_that_was_started_again_cannot_be_approved",),
    ),
    Mutant(
        "a change of state is audited",
        "apps/adaptations/lifecycle.py",
        "    _announce(adaptation, came_from, actor, reason, decided=",
        "    to in ADAPTATION_ENDED or _announce(adaptation, came_from, actor, reason, decided=",
        (LIFECYCLE + "test_a_confident_low_risk_proposal_goes_by_rule_to_kept",),
    ),
    Mutant(
        "an audit event covers the one before it",
        "apps/audit/chain.py",
        "if event.previous_hash != previous:",
        "if False:",
        (LIFECYCLE + "test_an_event_that_was_changed_with_its_own_hash_is_found_by_the_next_one",),
    ),
    Mutant(
        "an audit event is as it was written",
        "apps/audit/chain.py",
        "if event_hash(event) != event.hash:",
        "if False:",
        (LIFECYCLE + "test_damage_to_the_audit_log_is_found",),
    ),
    Mutant(
        "the kill switch stops a dispatch",
        "apps/adaptations/dispatch.py",
        "    if frozen:  # a switch or a freeze takes effect when it is committed",
        "    if False:",
        (LIFECYCLE + "test_the_kill_switch_stops_approvals_proposals_and_dispatch",),
    ),
    Mutant(
        "the kill switch stops an approval",
        "apps/adaptations/acts.py",
        "    if frozen:\n",
        "    if False:\n",
        (LIFECYCLE + "test_the_kill_switch_stops_approvals_proposals_and_dispatch",),
    ),
    Mutant(
        "a worker whose lease was taken away is refused (fence)",
        "apps/workers/jobs.py",
        "state=JobState.RUNNING, attempt=job.attempt)",
        "state=JobState.RUNNING)",
        (LIFECYCLE + "test_a_zombie_workers_late_result_is_refused",),
    ),
    Mutant(
        "a message of an older start of a trainer is refused by the server",
        "apps/runs/services.py",
        "    if epoch != run.epoch:",
        "    if epoch > run.epoch:",
        ("apps/trainers/test_trainer_endpoints.py", "apps/trainers/test_restored_database.py"),
    ),
    Mutant(
        "a repeated or older answer changes nothing",
        "apps/trainers/answers.py",
        "    if _RANK[ack.state] <= _RANK[CommandState(command.state)]:",
        "    if False:",
        (LIFECYCLE + "test_repeated_and_late_acknowledgements_change_nothing",),
    ),
    Mutant(
        "confidence that is not a number is never high",
        "esper/constraints/gates.py",
        "known = math.isfinite(confidence)",
        "known = True",
        ("esper/constraints/test_gates_at_their_limits.py",),
    ),
    Mutant(
        "a loss that is not a number takes a graft out",
        "esper/grafting/guard.py",
        "        if not math.isfinite(loss):",
        "        if False:",
        ("esper/grafting/test_guard.py::test_a_non_finite_loss_counts_at_once",),
    ),
    Mutant(
        "a trainer verifies the signature of a command",
        "esper/sdk/transport/commands.py",
        "        signing.verify(command.signing_bytes(), signature, trust.command_key)",
        "        command.signing_bytes()",
        (BAD_COMMAND,),
    ),
    Mutant(
        "a trainer refuses a command of another run",
        "esper/sdk/transport/commands.py",
        "if command.run != trust.run:",
        "if False:",
        (BAD_COMMAND,),
    ),
    Mutant(
        "a trainer refuses a command of another start",
        "esper/sdk/transport/commands.py",
        "if command.epoch != trust.epoch:",
        "if False:",
        (BAD_COMMAND,),
    ),
    Mutant(
        "a trainer refuses a command that it has taken already (replay)",
        "esper/sdk/transport/commands.py",
        "if command.seq <= last_seq:",
        "if False:",
        (COMMANDS + "test_a_replayed_command_is_refused_and_applied_once",),
    ),
    Mutant(
        "a trainer refuses an expired command",
        "esper/sdk/transport/commands.py",
        "if now >= command.expires_at:",
        "if False:",
        (BAD_COMMAND,),
    ),
    Mutant(
        "a trainer applies nothing that expired before its step boundary",
        "esper/sdk/command_handler.py",
        "        if self._queues.now() >= command.expires_at:\n"
        '            reason = "it expired before a step boundary came"\n'
        "            return Answer(failed(",
        "        if False:\n"
        '            reason = "it expired before a step boundary came"\n'
        "            return Answer(failed(",
        (COMMANDS + "test_a_graft_that_expired_before_its_step_boundary_is_not_applied",),
    ),
    Mutant(
        "a trainer writes a command into its journal before it obeys",
        "esper/sdk/transport/listening.py",
        "        self._journal.take_command(command.seq)\n        self._veto.check(command)",
        "        self._veto.check(command)",
        (COMMANDS + "test_a_replayed_command_is_refused_and_applied_once",),
    ),
    Mutant(
        "a trainer that observes is not changed",
        "esper/sdk/transport/commands.py",
        "if self.mode is RunMode.OBSERVE and not _changes_nothing(command):",
        "if False:",
        (COMMANDS + "test_an_observing_trainer_refuses_to_be_changed",),
    ),
    Mutant(
        "a kernel is signed by the trusted key",
        "esper/compilation/verify.py",
        '        signing.verify(manifest, files[SIGNATURE_FILE].decode("ascii"), trusted_key)',
        '        files[SIGNATURE_FILE].decode("ascii")',
        ("esper/compilation/test_kernel_files.py", BAD_COMMAND),
    ),
    Mutant(
        "a message of an earlier version is understood",
        "esper/contracts/protocol.py",
        "    ablation_gain: Number\n    ablation_low: Number = math.nan\n",
        "    ablation_gain: Number\n    needed: bool\n    ablation_low: Number = math.nan\n",
        (
            "apps/upgrade/test_work_in_flight.py::"
            "test_it_is_finished_by_what_an_earlier_version_sends",
        ),
    ),
    Mutant(
        "a command without an answer is in doubt, and the trainer is asked",
        "apps/adaptations/deadlines.py",
        "_WITH_TRAINER = (S.DISPATCHED, S.ACCEPTED, S.ROLLING_BACK)",
        "_WITH_TRAINER = (S.DISPATCHED, S.ACCEPTED)",
        (LATE + "test_the_question_decides_where_the_answer_to_an_undo_is_lost",),
    ),
    Mutant(
        "an older failure does not overwrite a later success",
        "apps/adaptations/outcomes.py",
        "elif _answered_later(command):",
        "elif False:",
        (LATE + "test_a_failure_that_is_told_after_the_success_of_a_later_undo_is_old",),
    ),
    Mutant(
        "a quarantine ends when the change is gone",
        "apps/adaptations/lifecycle.py",
        "if to != S.ROLLING_BACK and _QUARANTINING & {came_from, to}:",
        "if to == S.ROLLBACK_FAILED:",
        (LATE + "test_a_failed_undo_quarantines_the_run_until_the_change_is_gone",),
    ),
    Mutant(
        "deadlines are judged by the clock of the database",
        "apps/rest/clock.py",
        'if connection.vendor == "sqlite":',
        "if connection.vendor:",
        ("apps/concurrency/test_wrong_clocks_on_postgres.py",),
    ),
    Mutant(
        "probation without a verdict is rolled back",
        "apps/adaptations/lifecycle.py",
        "S.PROBATION: Deadline(S.ROLLING_BACK,",
        "S.PROBATION: Deadline(S.KEPT,",
        (LIFECYCLE + "test_no_deadline_leads_to_a_graft",),
    ),
)


def mutated(mutant: Mutant, text: str) -> str:
    """The broken file.

    Raises:
        ValueError: the rule is not in it, or more than once.
    """
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} has {text.count(mutant.old)} times: {mutant.old}")
    return text.replace(mutant.old, mutant.new)


def _copy(folder: Path) -> None:
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__", "node_modules")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "manage.py", "docs", "examples", "docker", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)


def _preload() -> None:
    """What every run of the tests imports and no mutant changes: a child has it at once."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in PRELOADED:
        with suppress(ImportError):
            importlib.import_module(name)


def _run(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit status and output of pytest in the copy, in a child process."""
    output = folder / "output.txt"
    marks = "not process and not browser and not full"
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "-m", marks]
    arguments += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is preloaded
    # After the verdict of the tests: a thread of a trainer that the mutant has broken.
    arguments += ["-W", "ignore::pytest.PytestUnhandledThreadExceptionWarning"]
    child = os.fork()
    if child == 0:
        try:
            _be_pytest(folder, output, [*arguments, *(f"tests/{test}" for test in tests)])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(CRASHED)  # nothing of the parent's is tidied up here
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), output.read_text(errors="replace")


def _be_pytest(folder: Path, output: Path, arguments: list[str]) -> None:
    """In the child: forget our own code, and import that of the copy."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
    for name in [name for name in sys.modules if name.partition(".")[0] in COPIED]:
        del sys.modules[name]
    status: int = pytest.main(arguments)
    sys.stdout.flush()
    os._exit(int(status))


def try_mutant(folder: Path, mutant: Mutant) -> str:
    """``killed by …``, ``survived`` or ``not tried``: the tests could not be run."""
    path = folder / mutant.file
    whole = path.read_text(encoding="utf-8")
    path.write_text(mutated(mutant, whole), encoding="utf-8")
    try:
        status, output = _run(folder, mutant.tests)
    finally:
        path.write_text(whole, encoding="utf-8")
    if status == 0:
        return "**survived**"
    red = [line for line in output.splitlines() if line.startswith("FAILED ")]
    if status != FAILED or not red:
        return f"**not tried**: pytest ended with {status}: {output[-300:]}"
    test = red[0].removeprefix("FAILED ").partition(" - ")[0].partition("[")[0]
    return f"killed by `{test.removeprefix('tests/')}`"


def _write(tried: list[str]) -> None:
    """Rows of rules that were not tried now stay as they are."""
    known = [line for line in read_section("mutants").splitlines() if line.startswith("| ")]
    rows = {line.split(" | ")[0]: line for line in [*known, *tried]}
    lines = [rows[f"| {mutant.rule}"] for mutant in MUTANTS if f"| {mutant.rule}" in rows]
    noticed = sum("| killed by" in line for line in lines)
    head = f"{noticed} of the {len(lines)} broken rules that were tried are noticed."
    if len(lines) < len(MUTANTS):
        head = f"{head} {len(MUTANTS) - len(lines)} more are in the list, and were not tried yet."
    table = "\n".join(["| rule that is broken | in | |", "|---|---|---|", *lines])
    write_section("mutants", f"{head}\n\n{table}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutants whose rule has this text")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin none after so long")
    parser.add_argument("--write", action="store_true", help="write the table to the page")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if arguments.only in mutant.rule]
    begin, lines = time.monotonic(), list[str]()
    _preload()
    with tempfile.TemporaryDirectory(prefix="esper-mutants-") as name:
        folder = Path(name)
        _copy(folder)
        for mutant in chosen:
            since = time.monotonic()
            if since > begin + arguments.seconds:
                break
            lines.append(f"| {mutant.rule} | `{mutant.file}` | {try_mutant(folder, mutant)} |")
            print(f"{lines[-1]} {time.monotonic() - since:.0f} s", flush=True)
    if arguments.write:
        _write(lines)
    noticed = sum("| killed by" in line for line in lines)
    return 0 if noticed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
