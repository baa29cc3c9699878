from django.apps import AppConfig


class BlueprintsConfig(AppConfig):
    name = "apps.blueprints"
    default_auto_field = "django.db.models.BigAutoField"
