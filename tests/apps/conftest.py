"""What all tests of the Django side share."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None, django_db_blocker: Any) -> None:
    """Tests with real transactions empty their tables afterwards, which the audit log refuses.

    The triggers are put back where they are what is tested.
    """
    from django.db import connection

    from apps.audit import triggers

    with django_db_blocker.unblock():
        triggers.remove(connection)
