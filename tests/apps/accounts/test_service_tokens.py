"""How a platform engineer gets Tamiyo its token."""

from __future__ import annotations

from io import StringIO

import pytest
from django.core.management import call_command

from apps.accounts.services import authenticate_token

pytestmark = pytest.mark.django_db


def test_a_service_token_works_and_its_account_has_no_password() -> None:
    answer = StringIO()
    call_command("issue_service_token", "tamiyo", stdout=answer)
    token = authenticate_token(answer.getvalue().strip())
    assert token is not None
    assert token.scopes == ["decide", "read"]
    assert not token.owner.has_usable_password()
