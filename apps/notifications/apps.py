from django.apps import AppConfig
from django.contrib.auth.signals import user_logged_out


class NotificationsConfig(AppConfig):
    name = "apps.notifications"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from apps.accounts.signals import account_changed
        from apps.notifications.services import end_sockets_of_session, recheck_sockets_of_member

        user_logged_out.connect(end_sockets_of_session, dispatch_uid="notifications.end_sockets")
        account_changed.connect(recheck_sockets_of_member, dispatch_uid="notifications.recheck")
