"""A web process over the small world, and a browser in which people are signed in to it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, StorageState, expect

from tests.apps.cast import PASSWORD
from tests.browser import WAIT_MS

ROOT = Path(__file__).resolve().parents[3]
SignIn = Callable[..., Page]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def console_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A web process of its own over a small world."""
    database = tmp_path_factory.mktemp("console") / "esper.sqlite3"
    port = _free_port()
    environment = {
        **os.environ,
        "DATABASE_URL": f"sqlite:///{database}",
        "DJANGO_SETTINGS_MODULE": "esper_web.settings.test",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("serve_world.py")
    server = subprocess.Popen([sys.executable, str(script), str(port)], env=environment, cwd=ROOT)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/login", server)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=600)


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert server.poll() is None, "the web process ended"
        try:
            httpx.get(address, timeout=600)
            return
        except httpx.TransportError:
            time.sleep(0.2)
    raise TimeoutError(address)


@pytest.fixture(scope="module")
def cookies() -> dict[str, StorageState]:
    """The session of each person who has signed in, so that everybody fills in the form once."""
    return {}


@pytest.fixture
def sign_in(
    chromium: Browser, console_url: str, cookies: dict[str, StorageState]
) -> Iterator[SignIn]:
    """``sign_in("olga")``: a page of a browser of her own; an error of a page fails the test."""
    complaints: list[str] = []
    contexts = []

    def signed_in(
        who: str, *, dark: bool = False, width: int = 1280, locale: str = "en-GB"
    ) -> Page:
        context = chromium.new_context(
            base_url=console_url,
            color_scheme="dark" if dark else "light",
            viewport={"width": width, "height": 800},
            storage_state=cookies.get(who),
            locale=locale,
        )
        contexts.append(context)
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        page.add_init_script(
            "addEventListener('securitypolicyviolation',"
            " (e) => console.error(`CSP ${e.violatedDirective} ${e.blockedURI}`))"
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: _note(said.type, said.text, complaints))
        if who in cookies:
            page.goto("/")
        else:
            fill_in_the_form(page, who)
            cookies[who] = context.storage_state()
        return page

    yield signed_in
    for context in contexts:
        context.close()
    assert complaints == []


def fill_in_the_form(page: Page, who: str) -> None:
    page.goto("/login")
    page.fill("#id_username", who)
    page.fill("#id_password", PASSWORD)
    page.click("button[type=submit]")
    page.wait_for_url("**/")


def _note(kind: str, text: str, complaints: list[str]) -> None:
    # Chromium writes every 4xx to the console, and these tests provoke refusals.
    if kind == "error" and "the server responded with a status of 4" not in text:
        complaints.append(text)


def wait_until_live(page: Page) -> None:
    expect(page.locator("#link-pill")).to_have_attribute("data-link", "live")
