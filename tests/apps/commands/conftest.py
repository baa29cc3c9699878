from __future__ import annotations

import pytest

from apps.accounts.models import User
from esper.contracts import Role, TokenScope
from tests.apps.callers import Caller
from tests.apps.cast import token_of
from tests.apps.commands.terminal import Terminal


@pytest.fixture
def terminal(operator: Caller) -> Terminal:
    """The operator's."""
    return Terminal(operator.token)


@pytest.fixture
def viewers_terminal(people: dict[Role, User]) -> Terminal:
    return Terminal(token_of(people[Role.VIEWER], TokenScope.READ))
