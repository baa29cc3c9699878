"""A real Chromium for the tests that look at pages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Tests wait for conditions. The limit only ends a broken test: a busy machine is no failure.
WAIT_MS = 300_000
TEST_SECONDS = 1500
expect.set_options(timeout=WAIT_MS)


@contextmanager
def open_chromium() -> Iterator[Browser]:
    """The system's Chromium, which ./check installs where it may."""
    if not CHROMIUM.exists():
        pytest.fail(
            f"This test needs Chromium, and {CHROMIUM} does not exist. Install Debian's package "
            "chromium, or name another program with CHROMIUM."
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()
