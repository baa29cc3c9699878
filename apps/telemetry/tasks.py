from __future__ import annotations

from celery import shared_task

from apps.telemetry.services import thin_telemetry


@shared_task(name="telemetry.thin")
def thin() -> int:
    return thin_telemetry()
