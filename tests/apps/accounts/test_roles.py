"""The role is the only thing that says what a person may do."""

from __future__ import annotations

import pytest

from apps.accounts.models import User
from esper.contracts import Role

pytestmark = pytest.mark.django_db


def test_a_superuser_made_on_the_command_line_is_an_admin_and_can_be_demoted() -> None:
    ada = User.objects.create_superuser(username="ada", password="a long password")
    assert (ada.role, ada.is_staff) == (Role.ADMIN, True)
    ada.role = Role.VIEWER
    ada.save()
    ada.refresh_from_db()
    assert (ada.role, ada.is_staff, ada.is_superuser) == (Role.VIEWER, False, False)
