"""The committed reference is what the code says now."""

from __future__ import annotations

import json
from pathlib import Path

from django.core.management import call_command

from scripts import cli_docs, openapi_docs


def test_the_openapi_document_is_what_the_server_makes(tmp_path: Path) -> None:
    made = tmp_path / "openapi.json"
    call_command("spectacular", format="openapi-json", file=str(made))
    committed = json.loads(openapi_docs.DOCUMENT.read_text(encoding="utf-8"))
    assert committed == json.loads(made.read_text()), "run python -m scripts.openapi_docs"


def test_the_rest_page_is_of_that_document() -> None:
    committed = json.loads(openapi_docs.DOCUMENT.read_text(encoding="utf-8"))
    files = openapi_docs.render(committed)
    assert list(openapi_docs.differing(files)) == [], "run python -m scripts.openapi_docs"


def test_the_command_line_page_is_of_the_commands() -> None:
    text = cli_docs.TARGET.read_text(encoding="utf-8")
    assert text == cli_docs.render(), "run python -m scripts.cli_docs"
