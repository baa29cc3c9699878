"""Celery tasks: each gets an id and calls one service. All state is in the database."""

from celery import shared_task

from apps.adaptations import compiled_kernels, services
from apps.workers.services import note_periodic_run, worker_name
from esper import tracing


@shared_task(name="adaptations.compile")
def compile_kernel(job_uid: str) -> None:
    services.compile_kernel(job_uid, worker=worker_name())


@shared_task(name="adaptations.dispatch")
def dispatch(adaptation_uid: str) -> None:
    with tracing.span("dispatch", adaptation=adaptation_uid):
        services.dispatch_adaptation(adaptation_uid, worker=worker_name())


@shared_task(name="adaptations.stage")
def stage(adaptation_uid: str) -> None:
    with tracing.span("stage", adaptation=adaptation_uid):
        services.stage_kernel(adaptation_uid)


@shared_task(name="adaptations.offer_speed_up")
def offer_speed_up(pk: int) -> None:
    compiled_kernels.offer(pk)


@shared_task(name="adaptations.speed_up")
def speed_up(pk: int) -> None:
    compiled_kernels.start_builder(pk)


@shared_task(name="adaptations.advance_plan")
def advance_plan(plan_uid: str) -> None:
    services.advance_plan(plan_uid)


@shared_task(name="adaptations.sweep")
def sweep() -> None:
    services.sweep()
    services.advance_plans()
    note_periodic_run("adaptations.sweep")
