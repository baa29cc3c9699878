"""A problem's ``type`` leads to a page that explains its code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from apps.rest.errors import _CODES
from apps.rest.problem_codes import PROBLEMS
from tests.apps.cast import make_person

APPS = Path(__file__).parents[3] / "apps"
_RAISED = re.compile(r'(?:Problem|Permission)\(\s*(?:\d{3}|False),\s*"([a-z-]+)"')


def test_every_code_that_is_raised_is_explained() -> None:
    sources = [path.read_text() for path in APPS.rglob("*.py")]
    raised = {code for source in sources for code in _RAISED.findall(source)}
    assert len(raised) > 20
    assert raised | set(_CODES.values()) <= set(PROBLEMS)


@pytest.mark.django_db
def test_the_page_has_a_row_for_each_code(client: Any) -> None:
    client.force_login(make_person("vera"))
    page = client.get("/api/docs/problems").content.decode()
    assert all(f'id="{code}"' in page for code in PROBLEMS)
