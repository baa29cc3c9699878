"""What a compile worker's role of PostgreSQL can do: build what was approved, and no more."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import DatabaseError, connection, transaction

from apps.adaptations import services, triggers
from apps.adaptations.compile_role import RIGHTS
from apps.adaptations.models import Adaptation
from apps.audit.services import verify_chain
from apps.kernels import cache
from apps.kernels.models import Kernel, SpeedUp, WarmUp
from apps.notifications.models import Channel, Delivery, FeedEvent, OutboxMessage
from apps.notifications.services import PLAN_TASK, plan_deliveries_of
from apps.violations.models import Violation
from apps.workers import builders
from apps.workers import services as workers
from apps.workers.models import CompileJob, Worker
from apps.workers.presence import report_devices
from esper.compilation import BuilderPool, BuildLimits
from esper.contracts import AdaptationState, JobState, SpeedUpState, WorkerMode
from tests.apps.cast import make_layer
from tests.apps.stage import Stage
from tests.apps.workers.test_worker_pool import live_worker

pytestmark = [pytest.mark.django_db, pytest.mark.postgres]

ROLE = "esper_compile_worker"
NAME = "compile@here"
ODD = (sys.executable, str(Path(__file__).parents[2] / "esper" / "compilation" / "odd_builder.py"))
S = AdaptationState


@pytest.fixture(scope="module")
def pool() -> Iterator[BuilderPool]:
    made = BuilderPool(BuildLimits(60.0, 2048), size=1, argv=ODD)
    yield made
    made.close()


@pytest.fixture
def compile_worker(
    db: None,
    pool: BuilderPool,
    settings: Any,
    tmp_path: Path,
    kernel_private_key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    """``compile_worker(act, …)`` acts with the role and without the keys of a compile worker."""
    (tmp_path / "kernel.key").write_text(kernel_private_key)
    settings.ESPER_KERNEL_KEY_FILE = str(tmp_path / "kernel.key")
    settings.ESPER_KERNEL_STORE_DIR = tmp_path / "kernels"
    # The thread that renews leases has a connection of its own, which does not see the test's rows.
    settings.ESPER_COMPILE_HEARTBEAT_SECONDS = 3600
    monkeypatch.setattr(builders, "_pool", pool)
    command_key = settings.ESPER_COMMAND_KEY
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE ROLE {ROLE}")
    triggers.install(connection)
    for _ in range(2):  # after each migrate
        call_command("grant_compile_role", ROLE)

    def act(what: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        settings.ESPER_COMMAND_KEY = ""
        try:
            with transaction.atomic(), connection.cursor() as cursor:
                cursor.execute(f"SET LOCAL ROLE {ROLE}")
                result = what(*arguments, **named)
                cursor.execute("RESET ROLE")
            return result
        finally:
            settings.ESPER_COMMAND_KEY = command_key

    return act


def execute(statement: str, *values: str) -> int:
    with connection.cursor() as cursor:
        cursor.execute(statement, values or None)
        return cursor.rowcount


def refusal(act: Callable[..., Any], *arguments: Any) -> str:
    """What the database says to it; empty when it does it."""
    try:
        act(*arguments)
    except DatabaseError as error:
        return str(error)
    return ""


def job_of(adaptation: Adaptation) -> CompileJob:
    adaptation.refresh_from_db()
    assert adaptation.job is not None
    return adaptation.job


# --- it can do its work ---------------------------------------------------------------------------


def test_a_whole_job_is_built(compile_worker: Callable[..., Any], stage: Stage) -> None:
    compile_worker(live_worker)
    compile_worker(report_devices)
    first, second = stage.propose(), stage.propose(layer="head")
    for adaptation in (first, second):
        compile_worker(services.compile_kernel, job_of(adaptation).uid, worker=NAME)

    jobs = CompileJob.objects.order_by("id")
    assert [(job.state, job.cached) for job in jobs] == [("done", False), ("done", True)]
    assert Kernel.objects.get().uses == 2
    services.dispatch_adaptation(first.uid, worker="control@here")
    assert [job_of(row).state and row.state for row in (first, second)] == [
        S.DISPATCHED,
        S.COMPILED,
    ]
    compile_worker(workers.mark_worker_stopped, NAME)
    assert verify_chain().verified


def test_a_lease_is_taken_renewed_and_given_back(
    compile_worker: Callable[..., Any], stage: Stage
) -> None:
    job = job_of(stage.propose())
    assert compile_worker(workers.claim_job, job, worker=NAME)
    assert compile_worker(workers.renew_lease, job)
    assert compile_worker(workers.fail_job, job, error="no", permanent=False) == JobState.QUEUED


def test_what_fails_is_told_and_its_worker_is_quarantined(
    compile_worker: Callable[..., Any], stage: Stage, settings: Any
) -> None:
    settings.ESPER_WORKER_CRASHES_MAX = settings.ESPER_COMPILE_ATTEMPTS = 1
    compile_worker(live_worker)
    Channel.objects.create(
        owner=stage.operator, kind="slack", target="https://e.org", events=["violation.opened"]
    )
    stage.run.layers = [*stage.run.layers, make_layer("segfault").to_wire()]
    stage.run.save()
    job = job_of(adaptation := stage.propose(layer="segfault"))
    compile_worker(services.compile_kernel, job.uid, worker=NAME)

    adaptation.refresh_from_db()
    assert adaptation.state == S.COMPILE_FAILED
    assert Violation.objects.count() == 1
    assert Worker.objects.get(name=NAME).mode == WorkerMode.QUARANTINED
    # The control worker tells the people, once.
    assert not Delivery.objects.exists()
    message = OutboxMessage.objects.get(task=PLAN_TASK)
    assert FeedEvent.objects.get(pk=message.args[0]).type == "violation.opened"
    for _ in range(2):
        plan_deliveries_of(*message.args)
    assert Delivery.objects.count() == 1


def test_kernels_are_built_ahead_and_corrupt_ones_again(
    compile_worker: Callable[..., Any], stage: Stage
) -> None:
    compile_worker(live_worker)
    job = job_of(stage.propose())
    compile_worker(services.compile_kernel, job.uid, worker=NAME)
    compile_worker(cache.report_corrupt, Kernel.objects.get(), "a flipped bit")
    again = WarmUp.objects.latest("id")
    assert again.blueprint_slug == job.blueprint_slug
    CompileJob.objects.update(state=JobState.DONE)
    compile_worker(cache.warm, again.pk, worker=NAME)

    again.refresh_from_db()
    assert again.state == JobState.DONE
    assert Kernel.objects.get().evicted_at is None


def test_a_compiled_kernel_is_claimed_and_its_end_is_told(
    compile_worker: Callable[..., Any], stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apps.adaptations import compiled_kernels

    adaptation = stage.propose()
    job_of(adaptation)
    row = SpeedUp.objects.create(
        adaptation_uid=adaptation.uid,
        run_uid=stage.run.uid,
        layer="fc",
        blueprint_slug=stage.blueprint.slug,
        capability="cpu",
    )
    kernel = Kernel.objects.first() or _any_kernel()
    report = type("Report", (), {"speedup": 1.5})()
    monkeypatch.setattr(compiled_kernels, "_build_or_reuse", lambda *_: (kernel, report))
    assert compile_worker(compiled_kernels.build_next, worker=NAME)
    row.refresh_from_db()
    assert (row.state, row.worker_speedup) == (SpeedUpState.BUILDING, 1.5)
    compile_worker(compiled_kernels._end, row, SpeedUpState.FAILED, "it does not compile")
    row.refresh_from_db()
    assert row.state == SpeedUpState.FAILED


def _any_kernel() -> Kernel:
    from tests.apps.cast import make_kernel

    return make_kernel()


# --- and no more ----------------------------------------------------------------------------------


FORBIDDEN = (
    # people, tokens, sessions, and where people are told
    "SELECT password FROM accounts_user",
    "SELECT digest FROM accounts_apitoken",
    "SELECT session_data FROM django_session",
    "SELECT target, secret FROM notifications_channel",
    "SELECT digest FROM notifications_socketticket",
    "SELECT body FROM rest_idempotencyrecord",
    "SELECT values FROM telemetry_frame",
    # what makes it more than it is
    "INSERT INTO accounts_apitoken (name) VALUES ('mine')",
    "UPDATE accounts_user SET is_superuser = true",
    "INSERT INTO recipes_launch (uid) VALUES ('x')",
    "UPDATE recipes_recipe SET argv = '[]'",
    "UPDATE policies_policyversion SET values = '{}'",
    'UPDATE policies_adaptationswitch SET "on" = true',
    "UPDATE blueprints_blueprint SET enabled = true",
    # what was approved, and who did it
    "UPDATE adaptations_adaptation SET decided_by_id = 1",
    "UPDATE adaptations_adaptation SET config = '{}'",
    "UPDATE adaptations_adaptation SET layer = 'head', blueprint_id = 1",
    "INSERT INTO adaptations_vote (reason) VALUES ('yes')",
    "DELETE FROM adaptations_adaptation",
    "UPDATE workers_compilejob SET config = '{}', layer = '{}'",
    "INSERT INTO workers_compilejob (uid) VALUES ('x')",
    # commands to trainers
    "INSERT INTO runs_command (seq) VALUES (1)",
    "UPDATE runs_run SET command_seq = 1",
    # the audit log
    "SELECT data FROM audit_auditevent",
    "UPDATE audit_auditevent SET actor = 'mallory'",
    "DELETE FROM audit_auditevent",
    "DROP POLICY everybody ON audit_auditevent",
    "ALTER TABLE adaptations_adaptation DISABLE ROW LEVEL SECURITY",
    "DELETE FROM django_migrations",
)


def test_it_reads_and_writes_nothing_else(compile_worker: Callable[..., Any], stage: Stage) -> None:
    stage.waiting()
    for statement in FORBIDDEN:
        why = refusal(compile_worker, execute, statement)
        assert "permission denied" in why or "must be owner" in why, statement


def test_it_has_no_right_to_a_table_of_which_no_job_is_made(
    compile_worker: Callable[..., Any], stage: Stage
) -> None:
    """Also none that was added after its rights were written down."""
    tables = set(connection.introspection.table_names())
    allowed = {right.model._meta.db_table for right in RIGHTS}
    assert len(tables - allowed) > 20
    with connection.cursor() as cursor:
        for table in tables - allowed:
            for act in ("SELECT", "INSERT", "UPDATE"):
                cursor.execute("SELECT has_any_column_privilege(%s, %s, %s)", [ROLE, table, act])
                assert cursor.fetchone() == (False,), (table, act)


def test_it_approves_nothing_and_changes_no_run(
    compile_worker: Callable[..., Any], stage: Stage
) -> None:
    adaptation = stage.waiting()
    move = "UPDATE adaptations_adaptation SET state = %s WHERE layer = %s"
    for state in S:
        assert compile_worker(execute, move, state, adaptation.layer) == 0, state
    stage.propose(layer="head")  # by rule; it is queued for the worker, which cannot send it
    for state in set(S) - {S.COMPILE_QUEUED, S.COMPILING, S.COMPILE_FAILED}:
        why = refusal(compile_worker, execute, move, state, "head")
        assert "row-level security" in why or "no such transition" in why, state
    raised = "UPDATE runs_run SET epoch = epoch + 1"
    assert "row-level security" in refusal(compile_worker, execute, raised)
    adaptation.refresh_from_db()
    assert adaptation.state == S.AWAITING_APPROVAL


def test_it_writes_no_act_and_asks_for_no_task_of_others(
    compile_worker: Callable[..., Any], stage: Stage
) -> None:
    event = (
        "INSERT INTO audit_auditevent (id, at, actor_kind, actor, via, act, object_kind, "
        "object_uid, run_uid, reason, data, previous_hash, hash) VALUES "
        "(99, now(), %s, 'olga', '', %s, '', '', '', '', '{}', '', '')"
    )
    for kind, act in (
        ("person", "adaptation.compiled"),
        *(("worker", f"adaptation.{state}") for state in (S.APPROVED, S.KEPT, S.DISPATCHED)),
        ("system", "worker.released"),
        ("worker", "token.issued"),
    ):
        assert "row-level security" in refusal(compile_worker, execute, event, kind, act), act
    message = (
        "INSERT INTO notifications_outboxmessage (task, queue, args, created_at, attempts) "
        "VALUES (%s, 'control', '[]', now(), 0)"
    )
    for task in ("recipes.start", "notifications.relay_outbox", "adaptations.sweep"):
        assert "row-level security" in refusal(compile_worker, execute, message, task), task


def test_other_roles_see_and_write_all_rows_as_before(
    compile_worker: Callable[..., Any], stage: Stage
) -> None:
    with connection.cursor() as cursor:
        cursor.execute("CREATE ROLE esper_application_beside")
        call_command("grant_database_role", "esper_application_beside")
        cursor.execute("SET ROLE esper_application_beside")
        adaptation = stage.grafted(stage.propose())
        assert adaptation.state == S.PROBATION
        assert verify_chain().verified
        cursor.execute("RESET ROLE")


def test_a_role_from_which_nothing_can_be_kept_is_refused(db: None) -> None:
    for role, why in (("postgres", "superuser or owns"), ("nobody_at_all", "no role")):
        with pytest.raises(CommandError, match=why):
            call_command("grant_compile_role", role)
