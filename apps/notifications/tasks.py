from celery import shared_task

from apps.notifications import delivering, services


@shared_task(name="notifications.relay_outbox")
def relay_outbox() -> None:
    services.relay_outbox()


@shared_task(name="notifications.forget_sent")
def forget_sent() -> None:
    services.forget_sent()


@shared_task(name=services.PLAN_TASK)
def plan(event_id: int, project_id: int | None) -> None:
    services.plan_deliveries_of(event_id, project_id)


@shared_task(name=services.DELIVER_TASK)
def deliver() -> None:
    delivering.deliver_due()


@shared_task(name="notifications.forget_deliveries")
def forget_deliveries() -> None:
    delivering.forget_old()
