from django.apps import AppConfig
from django.db.models.signals import post_migrate


class AdaptationsConfig(AppConfig):
    name = "apps.adaptations"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from apps.adaptations import backtest, triggers  # models can only be imported from here on
        from apps.policies.services import register_backtest

        register_backtest(backtest.backtest)

        post_migrate.connect(
            triggers.install_after_migrate, sender=self, dispatch_uid="adaptations.triggers"
        )
