"""PostgreSQL: the role of compile workers, which run compilers and must not be trusted with more.

It builds the kernels of jobs that were approved, and says what became of them. It reads no people,
tokens, sessions or channels, and approves, dispatches and configures nothing: what it may write is
bound to columns, and, where one table holds its rows and others', to rows.

The policies restrict this role alone; every other one sees and writes all rows as before. A
migration that changes the type of a column which a policy names must drop the policy first.
"""

from __future__ import annotations

from dataclasses import dataclass

from django.db.models import Model
from psycopg import sql

from apps.accounts.actors import ActorKind
from apps.adaptations.compile_jobs import DISPATCH_TASK, STAGE_TASK
from apps.adaptations.compiled_kernels import OFFER_TASK
from apps.adaptations.lifecycle import ADVANCE_TASK
from apps.adaptations.models import Adaptation, Plan
from apps.audit.models import AuditEvent, AuditHead
from apps.blueprints.models import Blueprint, Variant
from apps.kernels.models import CacheCounter, Kernel, SpeedUp, WarmUp
from apps.notifications.models import Feed, FeedEvent, OutboxMessage
from apps.notifications.services import PLAN_TASK
from apps.policies.models import PolicyVersion
from apps.runs.models import Run
from apps.violations.models import Violation
from apps.workers.models import CompileJob, JobStepDone, Worker
from apps.workers.services import COMPILE_TASK
from esper.contracts import AdaptationState as S

EVERYBODY = "everybody"  # the policy that leaves all other roles as they were
_STARTS = (S.COMPILE_QUEUED, S.COMPILING, S.COMPILED)
_ENDS = (*_STARTS, S.COMPILE_FAILED, S.DECLINED)
_ACTS = (*(f"adaptation.{state}" for state in _ENDS), "worker.quarantined", "kernel.corrupt")
_TASKS = (COMPILE_TASK, DISPATCH_TASK, STAGE_TASK, OFFER_TASK, ADVANCE_TASK, PLAN_TASK)


@dataclass(frozen=True, slots=True)
class Right:
    """What the role may do with one table.

    Attributes:
        adds: whether it may insert rows.
        changes: the columns that it may change; ``*`` stands for all.
        rows: conditions that the database adds for this role: (command, on the row as it is, on
            the row as it becomes); an empty condition is none.
    """

    model: type[Model]
    adds: bool = False
    changes: tuple[str, ...] = ()
    rows: tuple[tuple[str, str, str], ...] = ()


def _one_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(str(value)) for value in values)})"


_MOVES = ("state", "version", "changed_at", "deadline_at", "ended_at", "end_reason", "ended_step")
_OF_ATTEMPT = ("attempt", "lease_owner", "lease_until", "started_at", "waits_for")
_OF_RESULT = ("kernel_digest", "cached", "build_ms", "error", "log", "ended_at")

RIGHTS = (
    Right(
        Adaptation,
        changes=(*_MOVES, "kernel_id"),
        rows=(("UPDATE", _one_of("state", _STARTS), _one_of("state", _ENDS)),),
    ),
    # To lock a row takes the right to change it. No changed row passes the condition.
    Right(Run, changes=("epoch",), rows=(("UPDATE", "true", "false"),)),
    *(Right(model) for model in (Plan, Blueprint, Variant, PolicyVersion)),
    Right(CompileJob, changes=("state", *_OF_ATTEMPT, *_OF_RESULT)),
    Right(JobStepDone, adds=True),
    Right(Worker, adds=True, changes=("*",)),
    *(Right(model, adds=True, changes=("*",)) for model in (Kernel, WarmUp, CacheCounter)),
    Right(
        SpeedUp,
        changes=("state", "text", "kernel_id", "worker_speedup", "started_at", "ended_at"),
    ),
    Right(Violation, adds=True),
    Right(
        AuditEvent,
        adds=True,
        rows=(
            (
                "INSERT",
                "",
                f"{_one_of('actor_kind', (ActorKind.WORKER, ActorKind.SYSTEM))} AND "
                f"{_one_of('act', _ACTS)}",
            ),
        ),
    ),
    Right(AuditHead, changes=("last_id", "last_hash")),
    Right(Feed, adds=True, changes=("last_seq",)),
    Right(FeedEvent, adds=True),
    Right(
        OutboxMessage,
        adds=True,
        changes=("sent_at", "attempts"),
        rows=(("INSERT", "", _one_of("task", _TASKS)),),
    ),
)
# Of these it reads its own key only, as ``INSERT … RETURNING`` does.
_UNREAD = (AuditEvent, Violation)


def statements(role: str) -> list[sql.Composed]:
    """What gives ``role`` these rights and no other; repeating it changes nothing."""
    name = sql.Identifier(role)
    made = [
        sql.SQL("REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {}").format(name),
        sql.SQL("REVOKE ALL ON ALL SEQUENCES IN SCHEMA public FROM {}").format(name),
        sql.SQL("GRANT USAGE ON SCHEMA public TO {}").format(name),
    ]
    for right in RIGHTS:
        made += _grants(right, name) + _policies(right, name)
    return made


def _grants(right: Right, role: sql.Identifier) -> list[sql.Composed]:
    table = sql.Identifier(right.model._meta.db_table)
    rights: list[sql.Composable] = [
        sql.SQL("SELECT (id)") if right.model in _UNREAD else sql.SQL("SELECT")
    ]
    if right.adds:
        rights.append(sql.SQL("INSERT"))
    if right.changes == ("*",):
        rights.append(sql.SQL("UPDATE"))
    elif right.changes:
        columns = sql.SQL(", ").join(map(sql.Identifier, right.changes))
        rights.append(sql.SQL("UPDATE ({})").format(columns))
    return [sql.SQL("GRANT {} ON {} TO {}").format(sql.SQL(", ").join(rights), table, role)]


def _policies(right: Right, role: sql.Identifier) -> list[sql.Composed]:
    if not right.rows:
        return []
    table = sql.Identifier(right.model._meta.db_table)
    made = [_policy(table, EVERYBODY, sql.SQL("USING (true) WITH CHECK (true)"))]
    for command, before, after in right.rows:
        conditions = f"USING ({before}) " if before else ""
        rest = f"AS RESTRICTIVE FOR {command} TO {{}} {conditions}WITH CHECK ({after})"
        made.append(_policy(table, f"compile_{command.lower()}", sql.SQL(rest).format(role)))
    made.append(sql.SQL("ALTER TABLE {} ENABLE ROW LEVEL SECURITY").format(table))
    return made


def _policy(table: sql.Identifier, name: str, rest: sql.Composable) -> sql.Composed:
    policy = sql.Identifier(name)
    return sql.SQL("DROP POLICY IF EXISTS {0} ON {1}; CREATE POLICY {0} ON {1} {2}").format(
        policy, table, rest
    )
