"""The small world as a fixture, and a browser over it."""

from __future__ import annotations

import pytest

from tests.apps.console.browsing import console_url, cookies, sign_in
from tests.apps.console.world import World, build_world

__all__ = ["console_url", "cookies", "sign_in"]  # fixtures


@pytest.fixture
def world(db: None) -> World:
    return build_world()
