from celery import shared_task

from apps.notifications import services


@shared_task(name="notifications.relay_outbox")
def relay_outbox() -> None:
    services.relay_outbox()


@shared_task(name="notifications.forget_sent")
def forget_sent() -> None:
    services.forget_sent()
