"""One adaptation followed through the pages of a real Esper, with two people at it."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, Page, expect

from .conftest import TEST_SECONDS, WAIT_MS, Plant, until

pytestmark = [pytest.mark.process, pytest.mark.browser, pytest.mark.timeout(TEST_SECONDS)]


def signed_in(browser: Browser, plant: Plant, name: str, scheme: str = "light") -> Page:
    page = browser.new_context(color_scheme=scheme).new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(f"{plant.esper.url}/login")
    page.fill("input[name=username]", name)
    page.fill("input[name=password]", plant.esper.people[name])
    page.click("form button[type=submit]")
    expect(page.locator("#link-pill")).to_have_attribute("data-link", "live", timeout=WAIT_MS)
    return page


def test_two_people_see_one_adaptation_from_the_prompt_to_its_end(
    plant: Plant, chromium: Browser
) -> None:
    olga = signed_in(chromium, plant, "olga")
    ada = signed_in(chromium, plant, "ada", "dark")
    uid = plant.propose("squeeze", "mlp_gelu_2048")  # medium risk: a person is asked

    prompt = olga.get_by_text(re.compile("waits for a person"))
    expect(prompt.first).to_be_visible(timeout=WAIT_MS)  # pushed, nothing was reloaded
    expect(olga.locator("#inbox-count")).to_contain_text("1")

    for page in (olga, ada):
        page.goto(f"{plant.esper.url}/adaptations/{uid}")
        expect(page.locator("[data-path=approve]")).to_be_enabled(timeout=WAIT_MS)
    olga.fill("#reason", "the loss is flat")
    olga.click("[data-path=approve]")
    decision = olga.locator("#decision")
    expect(decision).to_have_attribute(
        "data-state", re.compile("probation|kept|rolled"), timeout=WAIT_MS
    )

    expect(ada.locator("[data-path=approve]")).to_have_count(0, timeout=WAIT_MS)
    expect(ada.get_by_text(re.compile("olga")).first).to_be_visible()
    expect(ada.get_by_text("the loss is flat").first).to_be_visible()

    until(lambda: plant.ended(uid), "judged")
    expect(decision).to_have_attribute(
        "data-state", re.compile("kept|rolled_back"), timeout=WAIT_MS
    )
    expect(olga.locator("#panel-outcome")).to_contain_text("Certificate")
    expect(decision).to_have_attribute("data-state", plant.state(uid))

    olga.goto(f"{plant.esper.url}/runs/{plant.run}")
    expect(olga.locator("#panel-timeline")).to_contain_text("mlp_gelu_2048")
    olga.goto(f"{plant.esper.url}/audit?verify=1")
    expect(olga.locator("main")).to_contain_text(re.compile("adaptation.approved"))
