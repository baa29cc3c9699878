"""All that other apps may do with workers, their queues and their jobs."""

from apps.workers.builders import Progress, builders, close_builders
from apps.workers.heartbeats import (
    Presence,
    heartbeat,
    mark_offline_workers,
    mark_worker_stopped,
    worker_name,
)
from apps.workers.jobs import (
    COMPILE_TASK,
    cancel_job,
    claim_job,
    fail_job,
    finish_job,
    holds_lease,
    jobs_with_lost_lease,
    note_steps,
    note_unserved_jobs,
    notify_worker,
    queue_job,
    renew_lease,
    replace_kernel,
)
from apps.workers.liveness import (
    Down,
    Part,
    disk_problem,
    down_processes,
    note_periodic_run,
    parts,
)
from apps.workers.modes import (
    is_quarantined,
    may_take_jobs,
    note_good_build,
    note_lost_builder,
    set_worker_mode,
)
from apps.workers.queues import compile_queue, queue_is_served, served_queues

__all__ = [
    "COMPILE_TASK",
    "Down",
    "Part",
    "Presence",
    "Progress",
    "builders",
    "cancel_job",
    "claim_job",
    "close_builders",
    "compile_queue",
    "disk_problem",
    "down_processes",
    "fail_job",
    "finish_job",
    "heartbeat",
    "holds_lease",
    "is_quarantined",
    "jobs_with_lost_lease",
    "mark_offline_workers",
    "mark_worker_stopped",
    "may_take_jobs",
    "note_good_build",
    "note_lost_builder",
    "note_periodic_run",
    "note_steps",
    "note_unserved_jobs",
    "notify_worker",
    "parts",
    "queue_is_served",
    "queue_job",
    "renew_lease",
    "replace_kernel",
    "served_queues",
    "set_worker_mode",
    "worker_name",
]
