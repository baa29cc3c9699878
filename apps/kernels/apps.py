from django.apps import AppConfig


class KernelsConfig(AppConfig):
    name = "apps.kernels"
    default_auto_field = "django.db.models.BigAutoField"
