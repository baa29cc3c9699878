"""The small world as a fixture."""

from __future__ import annotations

import pytest

from tests.apps.console.world import World, build_world


@pytest.fixture
def world(db: None) -> World:
    return build_world()
