from django.apps import AppConfig
from django.contrib.auth.signals import user_logged_out


class NotificationsConfig(AppConfig):
    name = "apps.notifications"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from apps.notifications.services import end_sockets_of_session

        user_logged_out.connect(end_sockets_of_session, dispatch_uid="notifications.end_sockets")
