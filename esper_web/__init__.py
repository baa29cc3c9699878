"""The web project: settings, routes, and the ASGI and Celery applications."""
