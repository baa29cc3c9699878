from django.apps import AppConfig
from django.contrib.auth.signals import user_logged_out
from django.db.models.signals import post_save


class NotificationsConfig(AppConfig):
    name = "apps.notifications"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from apps.accounts.models import User
        from apps.accounts.signals import account_changed
        from apps.notifications.services import (
            end_sockets_of_session,
            recheck_sockets,
            recheck_sockets_of_person,
        )

        user_logged_out.connect(end_sockets_of_session, dispatch_uid="notifications.end_sockets")
        account_changed.connect(recheck_sockets, dispatch_uid="notifications.recheck")
        uid = "notifications.recheck_person"
        post_save.connect(recheck_sockets_of_person, sender=User, dispatch_uid=uid)
