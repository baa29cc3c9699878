"""Django's accounts and passwords; the person comes with whether there is only one project."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.backends import ModelBackend
from django.db.models import Exists, OuterRef, Q

from apps.accounts.models import DEFAULT_PROJECT, Membership, Project, User


class PeopleBackend(ModelBackend):
    """Reads who is signed in."""

    def get_user(self, user_id: Any) -> User | None:
        """In the query that reads the person: most servers have one project, and ask no further."""
        others = Project.objects.exclude(pk=DEFAULT_PROJECT)
        own = Membership.objects.filter(user=OuterRef("pk"))
        people = User.objects.annotate(has_one_project=~Q(Exists(others)) & ~Q(Exists(own)))
        user = people.filter(pk=user_id).first()
        return user if user is not None and self.user_can_authenticate(user) else None
