"""Django's accounts and passwords; the person comes with whether there is only one project."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.backends import ModelBackend

from apps.accounts.models import User, has_one_project


class PeopleBackend(ModelBackend):
    """Reads who is signed in."""

    def user_can_authenticate(self, user: Any) -> bool:
        """A service account has tokens, and never a browser."""
        return super().user_can_authenticate(user) and not getattr(user, "is_service", False)

    def get_user(self, user_id: Any) -> User | None:
        """In the query that reads the person: most servers have one project, and ask no further."""
        people = User.objects.annotate(only_default=has_one_project("pk"))
        user = people.filter(pk=user_id).first()
        if user is not None:
            user.has_one_project = user.only_default
        return user if user is not None and self.user_can_authenticate(user) else None
