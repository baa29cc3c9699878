from django.apps import AppConfig


class AdaptationsConfig(AppConfig):
    name = "apps.adaptations"
    default_auto_field = "django.db.models.BigAutoField"
