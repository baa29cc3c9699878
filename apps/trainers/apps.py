from django.apps import AppConfig


class TrainersConfig(AppConfig):
    name = "apps.trainers"
    default_auto_field = "django.db.models.BigAutoField"
