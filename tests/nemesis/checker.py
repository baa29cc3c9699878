"""What must hold of a history, whatever happened to the processes.

It reads the audit log, the database and what the trainers wrote of themselves. It shares no code
with the application: the lifecycle and the hash of the audit log are written down here once more.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator

from tests.nemesis.history import AdaptationRow, AuditRow, CommandRow, History

ENDS = frozenset(
    {
        *("kept", "rolled_back", "declined", "rejected", "expired", "superseded", "cancelled"),
        *("compile_failed", "dispatch_expired", "not_applied", "apply_failed", "rollback_failed"),
        *("reverted", "run_lost"),
    }
)
_NEXT = {
    "": "proposed",
    "proposed": "awaiting_approval approved",
    "awaiting_approval": "approved rejected expired superseded cancelled",
    "approved": "compile_queued dispatched",
    "compile_queued": "compiling cancelled compile_failed",
    "compiling": "compile_queued compiled cancelled compile_failed",
    "compiled": "dispatched declined cancelled dispatch_expired",
    "dispatched": "accepted in_doubt not_applied",
    "accepted": "probation in_doubt not_applied apply_failed",
    "probation": "rolling_back in_doubt kept run_lost",
    "rolling_back": "in_doubt kept rolled_back rollback_failed reverted run_lost",
    "in_doubt": "accepted probation rolling_back rolled_back not_applied apply_failed reverted "
    "run_lost",
    "kept": "rolling_back reverted",
    "rollback_failed": "rolling_back rolled_back reverted",
    **dict.fromkeys(
        ("rolled_back", "reverted", "not_applied", "apply_failed", "run_lost"), "rollback_failed"
    ),
}
NEXT = {state: frozenset(following.split()) for state, following in _NEXT.items()}
APPLYING = frozenset({"graft", "remedy"})
NOT_UNDONE = frozenset({"failed", "refused"})
MARGIN_SECONDS = 1.0  # between the clocks of database and trainer, and for an answer on its way


def violations(history: History) -> list[str]:
    """A sentence for each thing that must not be; empty for a good history."""
    return [
        *_broken_chain(history),
        *_illegal_lives(history),
        *_without_an_end(history),
        *_applied_twice(history),
        *_applied_without_approval(history),
        *_applied_after_expiry(history),
        *_dispatched_after_kill(history),
        *_out_of_order(history),
        *_answers_that_are_not_true(history),
        *_failures_that_nobody_reported(history),
        *_quarantined_for_nothing(history),
        *_different_ends(history),
    ]


# --- the audit log


def _broken_chain(history: History) -> Iterator[str]:
    previous = "0" * 64
    for expected, row in enumerate(history.audit, start=1):
        if row.id != expected:
            yield f"audit event {expected} is missing"
            return
        if row.previous_hash != previous:
            yield f"audit event {row.id} does not follow the one before it"
            return
        if hash_of(row) != row.hash:
            yield f"audit event {row.id} was changed after it was written"
            return
        previous = row.hash
    if history.audit_end != (len(history.audit), previous):
        yield f"the audit log ends at {len(history.audit)}, but {history.audit_end[0]} were written"


def hash_of(row: AuditRow) -> str:
    """SHA-256 of the event as canonical JSON, with the hash of the one before it."""
    content = {
        name: getattr(row, name)
        for name in AuditRow.__dataclass_fields__
        if name not in ("hash", "at")
    }
    content["at"] = row.at.isoformat()
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _lives(history: History) -> dict[str, list[AuditRow]]:
    lives = defaultdict(list)
    for row in history.audit:
        if row.object_kind == "adaptation" and row.data.get("to"):
            lives[row.object_uid].append(row)
    return lives


def _illegal_lives(history: History) -> Iterator[str]:
    lives = _lives(history)
    for adaptation in history.adaptations:
        state, version = "", None
        for row in lives[adaptation.uid]:
            to = row.act.removeprefix("adaptation.")
            if to not in NEXT.get(state, frozenset()):
                yield f"{adaptation.uid} went from {state or 'nothing'} to {to}"
                break
            if version is not None and row.data["version"] <= version:
                yield f"{adaptation.uid} has version {row.data['version']} after {version}"
                break
            state, version = to, row.data["version"]
        else:
            if state != adaptation.state:
                yield f"{adaptation.uid} is {adaptation.state}, and its last event says {state}"


def _without_an_end(history: History) -> Iterator[str]:
    for adaptation in history.adaptations:
        if adaptation.state not in ENDS:
            yield f"{adaptation.uid} has no end: it is {adaptation.state}"


# --- what the trainers did


def _applied(history: History) -> Iterator[tuple[str, dict[str, object]]]:
    for run, lines in history.ledgers.items():
        for line in lines:
            if line["event"] == "applied":
                yield run, line


def _applied_twice(history: History) -> Iterator[str]:
    counts = Counter(line["adaptation"] for _, line in _applied(history))
    for uid, count in counts.items():
        if count > 1:
            yield f"{uid} was applied {count} times"


def _applied_without_approval(history: History) -> Iterator[str]:
    approved = {row.object_uid: row for row in history.audit if row.act == "adaptation.approved"}
    runs = {adaptation.uid: adaptation.run for adaptation in history.adaptations}
    for run, line in _applied(history):
        uid = str(line["adaptation"])
        if runs.get(uid) != run:
            yield f"{uid} was applied to {run}, whose adaptation it is not"
        elif uid not in approved:
            yield f"{uid} was applied, and nobody has approved it"
        elif approved[uid].at.timestamp() > float(str(line["at"])) + MARGIN_SECONDS:
            yield f"{uid} was applied before it was approved"


def _applied_after_expiry(history: History) -> Iterator[str]:
    commands = {(row.run, row.seq): row for row in history.commands}
    for run, line in _applied(history):
        if "seq" not in line:
            continue  # a real trainer's ledger does not know the command
        command = commands.get((run, line["seq"]))
        if command is None or command.kind not in APPLYING:
            yield f"{line['adaptation']} was applied by command {line['seq']}, which does not exist"
        elif float(str(line["at"])) > command.expires_at + MARGIN_SECONDS:
            yield f"{line['adaptation']} was applied after its command had expired"
        elif line["epoch"] != command.epoch:
            yield f"{line['adaptation']} was applied by a command of another epoch"


def _dispatched_after_kill(history: History) -> Iterator[str]:
    """The order of the audit log is the order of the commits."""
    killed = False
    for row in history.audit:
        if row.act in ("switch.killed", "switch.on"):
            killed = row.act == "switch.killed"
        elif killed and row.act == "adaptation.dispatched":
            yield f"{row.object_uid} was dispatched after the kill"


def _out_of_order(history: History) -> Iterator[str]:
    for run, lines in history.ledgers.items():
        last = 0
        for line in lines:
            if line["event"] != "command":
                continue
            if line["seq"] <= last:
                yield f"{run} took command {line['seq']} after {last}"
            last = max(last, line["seq"])
        if run in history.journals and history.journals[run] < last:
            yield f"{run} took command {last}, and its journal ends at {history.journals[run]}"
    numbers = defaultdict(list)
    for command in history.commands:
        numbers[command.run].append(command.seq)
    for run, given in numbers.items():
        if len(set(given)) != len(given):
            yield f"{run} has two commands of one number"


def _answers_that_are_not_true(history: History) -> Iterator[str]:
    """What the server believes to be applied, a trainer has applied."""
    applied = {line["adaptation"] for _, line in _applied(history)}
    for command in history.commands:
        if command.run not in history.ledgers or not _says_applied(command):
            continue
        if command.adaptation not in applied:
            yield f"{command.adaptation} is applied at the server, and its trainer never did it"


def _failures_that_nobody_reported(history: History) -> Iterator[str]:
    """A missing answer is no failure: a trainer has said that it could not take the change out."""
    undos = defaultdict(set)
    for command in history.commands:
        if command.kind == "undo":
            undos[command.adaptation].add(command.state)
    for row in history.audit:
        if row.act == "adaptation.rollback_failed" and not undos[row.object_uid] & NOT_UNDONE:
            yield f"{row.object_uid} is rollback_failed, and no trainer has said so"


def _quarantined_for_nothing(history: History) -> Iterator[str]:
    failed = {row.run for row in history.adaptations if row.state == "rollback_failed"}
    doubtful = {row.run for row in history.adaptations if row.state == "in_doubt"}
    for run in sorted(history.quarantined - failed - doubtful):
        yield f"{run} is quarantined, and everything about it is known"
    for run in sorted(failed - history.quarantined):
        yield f"{run} holds what could not be taken out, and is not quarantined"


def _says_applied(command: CommandRow) -> bool:
    return command.kind in APPLYING and command.state == "applied"


# --- what is true at the end


def held_at_the_end(lines: list[dict[str, object]]) -> set[str]:
    """The changes in a trainer's model: its checkpoint's, and what it did after that."""
    held: set[str] = set()
    for line in lines:
        if line["event"] == "start":
            held = set(line["held"])  # type: ignore[call-overload]
        elif line["event"] == "applied":
            held.add(str(line["adaptation"]))
        elif line["event"] == "removed":
            held.discard(str(line["adaptation"]))
    return held


def _different_ends(history: History) -> Iterator[str]:
    by_run: dict[str, list[AdaptationRow]] = defaultdict(list)
    for adaptation in history.adaptations:
        by_run[adaptation.run].append(adaptation)
    for run in sorted(history.live_runs):
        held = held_at_the_end(history.ledgers[run])
        for adaptation in by_run[run]:
            if adaptation.once or adaptation.state not in ENDS:
                continue  # what acts once is in what the run has learned, not in what it holds
            if adaptation.state == "rollback_failed":
                if adaptation.uid not in held:
                    yield f"{adaptation.uid} is rollback_failed, and its trainer has taken it out"
                continue
            if adaptation.state == "kept" and adaptation.uid not in held:
                yield f"{adaptation.uid} is kept at the server, and its trainer does not hold it"
            if adaptation.state != "kept" and adaptation.uid in held:
                yield f"{adaptation.uid} is {adaptation.state}, and its trainer holds it"
        unknown = held - {adaptation.uid for adaptation in by_run[run]}
        for uid in sorted(unknown):
            yield f"{uid} is in the model of {run}, and the server does not know it"
