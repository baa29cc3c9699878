from celery import shared_task

from apps.audit import services


@shared_task(name="audit.sign_head")
def sign_head() -> None:
    services.sign_head()
