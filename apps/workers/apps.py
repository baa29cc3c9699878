from django.apps import AppConfig


class WorkersConfig(AppConfig):
    name = "apps.workers"
    default_auto_field = "django.db.models.BigAutoField"
