"""The pages in German in a real Chromium: nothing stays English, is cut off, or fails to draw."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.apps.console.browsing import SignIn, wait_until_live
from tests.apps.console.catalogue import READ, messages
from tests.apps.console.test_console_in_a_browser import pages_of, width_beyond_the_screen
from tests.browser import TEST_SECONDS

pytestmark = [pytest.mark.browser, pytest.mark.timeout(TEST_SECONDS)]

TEXTS = """(read) => {
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walk.nextNode()) {
    if (!walk.currentNode.parentElement.closest("script, code, kbd, pre")) {
      if (!walk.currentNode.parentElement.querySelector("wbr")) { // names of code
        found.push(walk.currentNode.textContent);
      }
    }
  }
  for (const name of read) {
    const marked = document.querySelectorAll(`[${name}]:not(li)`);
    for (const one of marked) found.push(one.getAttribute(name));
  }
  return found.map((text) => text.trim()).filter(Boolean);
}"""


def english_words() -> set[str]:
    """Texts that only an untranslated place shows: a German one of the same letters is none."""
    pairs = [
        (str(message.id), str(message.string))
        for domain in ("django", "djangojs")
        for message in messages(domain)
        if not isinstance(message.id, tuple)
    ]
    german = {text for _, text in pairs}
    return {text for text, other in pairs if text != other} - german


def english_on(page: Page) -> set[str]:
    shown = set(page.evaluate(TEXTS, list(READ)))
    assert len(shown) > 10
    return shown & english_words() - {"system", "control"}  # names: who acted, and a worker


def say_nothing_in_english(page: Page) -> None:
    assert english_on(page) == set(), page.url


def test_no_german_page_keeps_english_or_scrolls_sideways_on_a_phone(sign_in: SignIn) -> None:
    addresses = pages_of(sign_in("ada"))
    page = sign_in("ada", locale="de-DE")
    page.set_viewport_size({"width": 360, "height": 844})
    wide, english = {}, {}
    for address in addresses:
        page.goto(address)
        wait_until_live(page)
        wide[address] = width_beyond_the_screen(page)
        english[address] = english_on(page)
    assert {address: over for address, over in wide.items() if over} == {}
    assert {address: words for address, words in english.items() if words} == {}


def test_the_operator_s_path_is_german_from_the_sign_in_to_the_decision(sign_in: SignIn) -> None:
    """After the test of all pages, which looks at the decision that is made here."""
    page = sign_in("olga", locale="de-DE")
    expect(page.locator("#link-pill")).to_contain_text("Live")
    say_nothing_in_english(page)
    page.locator("#panel-attention li:has-text('classifier.2') a.button").click()
    wait_until_live(page)
    say_nothing_in_english(page)
    page.click("[data-path=reject]")
    expect(page.locator("#acts-error")).to_contain_text("Begründen Sie die Ablehnung")
    page.click("[data-path=claim]")
    expect(page.locator(".toast")).to_contain_text("Für zehn Minuten übernommen.")
    page.click("[data-path=release]")
    expect(page.locator("[data-path=claim]")).to_be_visible()
    page.click("[data-path=approve]")
    expect(page.locator("#panel-head")).to_contain_text("olga hat es genehmigt")
    say_nothing_in_english(page)  # the panels that were fetched again are German, too
    page.goto("/inbox")
    say_nothing_in_english(page)


def test_the_charts_are_drawn_and_said_in_german(sign_in: SignIn) -> None:
    page = sign_in("vera", locale="de-DE")
    page.goto("/runs")
    page.click("a:text-is('digits-cnn')")
    expect(page.locator("#loss-summary")).to_contain_text(re.compile(r"Von \d+,\d+ bei Schritt 0"))
    expect(page.locator("#loss-summary")).to_contain_text("2 Erweiterungen sind markiert")
    expect(page.locator("#heat-summary")).to_contain_text("in classifier.2")
    expect(page.locator("#loss-chart canvas")).to_have_count(1)
    expect(page.locator("#lane .event")).not_to_have_count(0)
    say_nothing_in_english(page)


def test_the_choice_in_the_settings_holds_at_once(sign_in: SignIn) -> None:
    page = sign_in("carl")
    page.goto("/me")
    page.select_option("#set-language", "de")
    page.click("#settings-form button[type=submit]")
    page.wait_for_url("**/me?saved=1*")
    expect(page.locator("html")).to_have_attribute("lang", "de")
    expect(page.locator("#settings-form button[type=submit]")).to_have_text(
        "Einstellungen speichern"
    )
