"""The tour shows each page of the console, with a picture."""

from __future__ import annotations

from apps.console.urls import urlpatterns
from scripts.tour import NOT_SHOWN, PICTURES, STOPS, TARGET, render


def test_the_page_is_what_the_generator_writes() -> None:
    assert TARGET.read_text(encoding="utf-8") == render(), "run python -m scripts.tour"


def test_each_page_of_the_console_is_shown_or_has_a_reason() -> None:
    shown = {stop.page for stop in STOPS}
    assert shown | NOT_SHOWN.keys() == {pattern.name for pattern in urlpatterns}
    assert not shown & NOT_SHOWN.keys()


def test_each_picture_is_there_and_is_shown() -> None:
    assert {path.name for path in PICTURES.iterdir()} == {stop.picture.name for stop in STOPS}
