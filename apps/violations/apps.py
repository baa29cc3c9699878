from django.apps import AppConfig


class ViolationsConfig(AppConfig):
    name = "apps.violations"
    default_auto_field = "django.db.models.BigAutoField"
