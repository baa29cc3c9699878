"""Names and reasons come from unknown models: pages show them and never run them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

from apps.adaptations.models import Adaptation
from apps.console.templatetags.console import visible
from apps.runs.models import Run

POLYGLOT = "\"><img src=x onerror=alert(1)><svg/onload=alert(2)>{{7*7}}'\u202e</script>"


class Live(HTMLParser):
    """Elements of a page that would run something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {name for name, _ in attrs}
        handlers = [name for name in names if name.startswith("on")]
        code = tag == "script" and "src" not in names and ("type", "application/json") not in attrs
        if handlers or code or tag in {"img", "iframe", "object"}:
            self.found.append(tag)


def test_the_detector_finds_what_an_unescaped_page_would_run() -> None:
    assert Live(f'<p title="{POLYGLOT}">').found == ["img", "svg"]


def poison(world: Any) -> None:
    run = world.runs["digits-cnn"]
    layers = [{**layer, "name": POLYGLOT + layer["name"]} for layer in run.layers]
    Run.objects.filter(pk=run.pk).update(
        name=POLYGLOT,
        layers=layers,
        host=POLYGLOT,
        end_reason=POLYGLOT,
        quarantined_reason=POLYGLOT,
    )
    for adaptation in Adaptation.objects.filter(run=run):
        Adaptation.objects.filter(pk=adaptation.pk).update(
            layer=POLYGLOT + adaptation.layer,
            asks=[POLYGLOT],
            reasons=[{"signal": POLYGLOT, "observed": 1, "weight": 1, "text": POLYGLOT}],
            checks=[{"rule": POLYGLOT, "passed": False, "observed": POLYGLOT, "limit": POLYGLOT}],
            why_not=[{"blueprint": POLYGLOT, "reason": POLYGLOT}],
            evidence={POLYGLOT: 1.0},
            config={POLYGLOT: POLYGLOT},
            decision_reason=POLYGLOT,
            end_reason=POLYGLOT + ".",
        )


def test_hostile_names_are_text_on_every_page(world: Any) -> None:
    poison(world)
    client = world.client("olga")
    run, waiting = world.runs["digits-cnn"].uid, world.adaptations["waiting"].uid
    kept = world.adaptations["kept"].uid
    for address in (
        "/",
        "/inbox",
        "/inbox?state=history",
        "/runs",
        f"/runs/{run}",
        f"/adaptations/{waiting}",
        f"/adaptations/{kept}",
        "/blueprints/mlp_gelu_2048",
        "/violations?state=all",
        "/incidents",
        "/kernels",
        "/audit",
    ):
        text = client.get(address).content.decode()
        assert "This part could not be shown" not in text, address
        assert Live(text).found == [], address
        shown = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
        turned = [line.strip()[:300] for line in shown.splitlines() if "\u202e" in line]
        assert turned == [], address


def test_invisible_characters_are_made_visible() -> None:
    assert visible("a\u202eb\u200bc") == "a⟨U+202E⟩b⟨U+200B⟩c"
    assert visible("größe 中文 layer.0") == "größe 中文 layer.0"


def test_a_name_from_right_to_left_does_not_move_the_numbers_around_it() -> None:
    """A sentence "lowest 1 in <name>, highest 2" was shown with the 2 before the name."""
    assert visible("1 in שכבה_ראשונה, 2 of 3") == "1 in \u2068שכבה_ראשונה\u2069, 2 of 3"
    assert visible("enc.שכבה 2 אחת.0") == "enc.\u2068שכבה 2 אחת\u2069.0"
    assert visible("naïve ⟨größe⟩") == "naïve ⟨größe⟩"
