"""Two runs side by side."""

from __future__ import annotations

import re
from typing import Any

import pytest

from apps.runs.models import Run

pytestmark = pytest.mark.django_db


def test_two_runs_are_compared_by_loss_numbers_and_architecture(world: Any) -> None:
    first, second = world.runs["digits-cnn"], world.runs["topics-lm"]
    layers = [*second.layers, {**second.layers[0], "name": "extra"}]
    Run.objects.filter(pk=second.pk).update(layers=layers)
    page = world.client("vera")
    text = page.get(f"/runs/compare?a={first.uid}&b={second.uid}").content.decode()
    assert text.count("<polyline") == 2
    assert "1 layer only in topics-lm" in text
    assert "only in digits-cnn" not in text
    row = text[text.index(">classifier.0</th>") :]
    row = row[: row.index("</tr>")]
    assert f"A-{world.adaptations['kept'].number}</a> mlp_gelu_2048" in row.split("</td>")[0]
    assert f"A-{world.adaptations['merged'].number}</a> proj_lora_64" in row.split("</td>")[1]


def test_the_picture_is_the_same_in_german(world: Any) -> None:
    """A browser reads no coordinate that is written with a comma."""
    first, second = world.runs["digits-cnn"], world.runs["topics-lm"]
    address = f"/runs/compare?a={first.uid}&b={second.uid}"
    pages = [
        world.client("vera").get(address, HTTP_ACCEPT_LANGUAGE=language).content.decode()
        for language in ("en", "de")
    ]
    english, german = (re.findall(r' (?:d|points)="([^"]+)"', text) for text in pages)
    assert "Schritte" in pages[1]
    assert english == german != []


def test_one_run_is_chosen_already_where_its_page_links_here(world: Any) -> None:
    run = world.runs["digits-cnn"]
    page = world.client("vera")
    assert f"/runs/compare?a={run.uid}" in page.get(f"/runs/{run.uid}").content.decode()
    text = page.get(f"/runs/compare?a={run.uid}").content.decode()
    assert f'value="{run.uid}" selected' in text
    assert "Choose two runs." in text
    assert page.get("/runs/compare?a=run_none").status_code == 404
