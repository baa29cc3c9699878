"""Everything that the checker reads: the database, and the ledgers and journals of the trainers.

It reads the tables themselves, with no code of the application.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.nemesis.ledger import read_ledger


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """One event of the audit log, with all that its hash covers."""

    id: int
    at: datetime
    actor_kind: str
    actor: str
    via: str
    act: str
    object_kind: str
    object_uid: str
    run_uid: str
    reason: str
    data: dict[str, Any]
    previous_hash: str
    hash: str


@dataclass(frozen=True, kw_only=True)
class AdaptationRow:
    """An adaptation as the server has it."""

    uid: str
    run: str
    state: str
    version: int
    remedy: str = ""
    once: bool = False  # a remedy that changes the run once, and is not in effect afterwards


@dataclass(frozen=True, kw_only=True)
class CommandRow:
    """An entry of a run's command log; times in seconds since the epoch."""

    run: str
    epoch: int
    seq: int
    kind: str
    adaptation: str
    issued_at: float
    expires_at: float
    state: str


@dataclass(kw_only=True)
class History:
    """What happened.

    Attributes:
        ledgers: each run's own account, oldest line first.
        journals: the last command that each run's journal holds.
        live_runs: the runs whose trainers were alive at the end, so that the histories must agree.
        quarantined: the runs that the server refuses to change.
    """

    audit: list[AuditRow] = field(default_factory=list)
    audit_end: tuple[int, str] = (0, "0" * 64)
    adaptations: list[AdaptationRow] = field(default_factory=list)
    commands: list[CommandRow] = field(default_factory=list)
    ledgers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    journals: dict[str, int] = field(default_factory=dict)
    live_runs: set[str] = field(default_factory=set)
    quarantined: set[str] = field(default_factory=set)


def read_history(database: Any, folder: Path) -> History:
    """The history of all runs of which ``folder`` has a ledger.

    Args:
        database: a connection of psycopg.
        folder: of the ledgers ``NAME.ledger.jsonl`` and the journals below ``journals/NAME``.
    """
    history = History()
    with database.transaction(), database.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        cursor.execute(
            "SELECT id, at, actor_kind, actor, via, act, object_kind, object_uid, run_uid, reason, "
            "data::text, previous_hash, hash FROM audit_auditevent ORDER BY id"
        )
        names = [column.name.split("::")[0] for column in cursor.description]
        for row in cursor.fetchall():
            members = dict(zip(names, row, strict=True))
            history.audit.append(AuditRow(**{**members, "data": json.loads(members["data"])}))
        cursor.execute("SELECT last_id, last_hash FROM audit_audithead")
        history.audit_end = cursor.fetchone()
        cursor.execute(
            "SELECT a.uid, r.uid, a.state, a.version, a.remedy, k.slug IS NOT NULL AND NOT k.stays "
            "FROM adaptations_adaptation a JOIN runs_run r ON r.id = a.run_id "
            "LEFT JOIN blueprints_knownremedy k ON k.slug = a.remedy ORDER BY a.id"
        )
        for uid, run, state, version, remedy, once in cursor.fetchall():
            row = AdaptationRow(
                uid=uid, run=run, state=state, version=version, remedy=remedy, once=once
            )
            history.adaptations.append(row)
        cursor.execute(
            "SELECT r.uid AS run, c.epoch, c.seq, c.kind, c.adaptation_uid AS adaptation, "
            "extract(epoch FROM c.issued_at)::float8 AS issued_at, "
            "extract(epoch FROM c.expires_at)::float8 AS expires_at, c.state "
            "FROM runs_command c JOIN runs_run r ON r.id = c.run_id ORDER BY c.run_id, c.seq"
        )
        names = [column.name for column in cursor.description]
        for row in cursor.fetchall():
            history.commands.append(CommandRow(**dict(zip(names, row, strict=True))))
        cursor.execute("SELECT uid, name, quarantined_reason FROM runs_run")
        for uid, name, quarantined_reason in cursor.fetchall():
            if quarantined_reason:
                history.quarantined.add(uid)
            _read_trainer(history, folder, uid, name)
    return history


def _read_trainer(history: History, folder: Path, uid: str, name: str) -> None:
    ledger = folder / f"{name}.ledger.jsonl"
    if not ledger.exists():
        return
    history.ledgers[uid] = list(read_ledger(ledger))
    history.live_runs.add(uid)
    journal = folder / "journals" / name / uid / "journal.jsonl"
    if journal.exists():
        taken = (line["seq"] for line in read_ledger(journal) if line.get("kind") == "command")
        history.journals[uid] = max(taken, default=0)
