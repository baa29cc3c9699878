from django.apps import AppConfig


class RecipesConfig(AppConfig):
    name = "apps.recipes"
    default_auto_field = "django.db.models.BigAutoField"
