"""A real browser at the real front door: sign-in, and the API's page under the strict policy."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.browser import TEST_SECONDS

pytestmark = [pytest.mark.browser, pytest.mark.process, pytest.mark.timeout(TEST_SECONDS)]

WATCH_POLICY = """
window.policyViolations = [];
document.addEventListener('securitypolicyviolation', (event) => {
  window.policyViolations.push(`${event.violatedDirective} ${event.blockedURI}`);
});
"""


@pytest.fixture
def olga(page: Page, running_esper: Any) -> Page:
    """The operator, signed in."""
    page.add_init_script(WATCH_POLICY)
    page.goto(f"{running_esper.url}/login")
    page.fill("input[name=username]", "olga")
    page.fill("input[name=password]", running_esper.people["olga"])
    page.press("input[name=password]", "Enter")
    page.wait_for_url(f"{running_esper.url}/")
    return page


def test_an_operator_signs_in_and_sees_who_she_is(olga: Page) -> None:
    expect(olga.locator("body")).to_contain_text("olga")
    assert olga.evaluate("window.policyViolations") == []


def test_a_wrong_password_lets_nobody_in(page: Page, running_esper: Any) -> None:
    page.goto(f"{running_esper.url}/login")
    page.fill("input[name=username]", "olga")
    page.fill("input[name=password]", "not her password")
    page.press("input[name=password]", "Enter")
    expect(page.get_by_role("alert")).to_contain_text("do not match")
    expect(page.locator("input[name=password]")).to_be_visible()
    page.goto(f"{running_esper.url}/")
    expect(page.locator("input[name=password]")).to_be_visible()


def test_the_api_page_shows_the_api_under_the_strict_policy(olga: Page, running_esper: Any) -> None:
    olga.goto(f"{running_esper.url}/api/docs")
    expect(olga.locator(".swagger-ui .info .title")).to_contain_text("Esper")
    expect(olga.locator(".opblock").first).to_be_visible()
    assert olga.evaluate("window.policyViolations") == []
