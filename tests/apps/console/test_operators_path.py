"""The operator's path: from the overview to a decision that is made, in real clicks."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.apps.console.browsing import SignIn, wait_until_live
from tests.browser import TEST_SECONDS

pytestmark = [pytest.mark.browser, pytest.mark.timeout(TEST_SECONDS)]

MOST_CLICKS = 3
COUNT_CLICKS = """addEventListener("click", (event) => {
  if (event.isTrusted) sessionStorage.clicks = Number(sessionStorage.clicks ?? 0) + 1;
}, true)"""
Decide = Callable[[Page], None]


def approve(page: Page) -> None:
    page.click("[data-path=approve]")


def reject(page: Page) -> None:
    """The reason is demanded: the first press asks for it and puts the cursor there."""
    page.click("[data-path=reject]")
    expect(page.locator("#reason")).to_be_focused()
    page.keyboard.type("the loss still falls")
    page.click("[data-path=reject]")


# Each case uses up one decision of the small world.
@pytest.mark.parametrize(
    ("decide", "layer", "width", "told"),
    [
        (approve, "classifier.2", 1280, "ada approved it"),
        (reject, "features.3", 390, "ada rejected it"),
    ],
)
def test_a_decision_is_at_most_three_clicks_from_the_overview(
    sign_in: SignIn,
    record_property: Callable[[str, object], None],
    decide: Decide,
    layer: str,
    width: int,
    told: str,
) -> None:
    page = sign_in("ada", width=width)
    page.add_init_script(COUNT_CLICKS)
    page.goto("/")
    wait_until_live(page)
    row = page.locator(f"#panel-attention li:has-text('{layer}')")
    began = time.monotonic()
    row.locator("a.button").click()
    wait_until_live(page)
    expect(page.locator("#panel-why li >> nth=0")).to_be_in_viewport()  # evidence comes first
    decide(page)
    expect(page.locator("#panel-head")).to_contain_text(told)
    seconds = time.monotonic() - began
    clicks = int(page.evaluate("sessionStorage.clicks"))
    record_property("clicks", clicks)
    record_property("seconds", round(seconds, 1))
    print(f"\n{decide.__name__} at {width} px: {clicks} clicks, {seconds:.1f} s")  # noqa: T201
    assert clicks <= MOST_CLICKS
