"""The periodic work of the kernel cache."""

from celery import shared_task

from apps.kernels import cache
from apps.workers.services import worker_name


@shared_task(name="kernels.limit_cache")
def limit_cache() -> None:
    cache.limit_cache()


@shared_task(name="kernels.scrub")
def scrub() -> None:
    cache.scrub()


@shared_task(name="kernels.warm_next")
def warm_next() -> None:
    cache.warm_next()


@shared_task(name="kernels.warm")
def warm(pk: int) -> None:
    cache.warm(pk, worker=worker_name())
