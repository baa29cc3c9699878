"""Celery tasks of launches; the import of ``watching`` starts this host's watching thread."""

from celery import shared_task

from apps.recipes import hosting, services, watching
from apps.recipes.models import Launch

__all__ = ["watching"]


@shared_task(name="recipes.start")
def start(launch_uid: str) -> None:
    hosting.start(_launch(launch_uid))


@shared_task(name="recipes.stop")
def stop(launch_uid: str) -> None:
    hosting.look_at(_launch(launch_uid))


@shared_task(name="recipes.sweep")
def sweep() -> None:
    services.sweep()


def _launch(uid: str) -> Launch:
    return Launch.objects.select_related("recipe", "requested_by", "branch_of").get(uid=uid)
