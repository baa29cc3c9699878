"""The whole matrix: every blueprint at every kind of layer of every model. ``./check --all``."""

from __future__ import annotations

import pytest

from tests.matrix.report import examine_specimen
from tests.matrix.zoo import ZOO

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("name", ZOO)
def test_every_blueprint_is_grafted_and_undone_to_the_bit_or_refused(name: str) -> None:
    examined = examine_specimen(name)
    assert examined.faults == []
    assert any(not outcome.refused for outcome in examined.outcomes)
