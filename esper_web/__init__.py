"""The web project: settings, routes, and the ASGI and Celery applications."""

# Loaded with the settings in every process, because apps send tasks through celery.current_app.
from esper_web.celery import app as celery_app

__all__ = ["celery_app"]
