"""Write ``docs/reference/openapi.json`` and ``rest.md`` from the endpoints of the server.

python -m scripts.openapi_docs            write
python -m scripts.openapi_docs --check    exit 1 where a file differs

The document is the one that ``manage.py spectacular`` makes and ``/api/schema`` serves.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
DOCUMENT, PAGE = FOLDER / "openapi.json", FOLDER / "rest.md"
PREFIX = "/api/v1/"
METHODS = ("get", "post", "put", "patch", "delete")
HEADER = """# REST

Written by `python -m scripts.openapi_docs` from the endpoints. [openapi.json](openapi.json) is the
whole document with every schema; a running server shows it under `/api/docs`.
[The protocol](../protocol.md) explains the rules that all endpoints share.

Every path begins with `/api/v1/`. **act**: the request needs the header `Idempotency-Key`.
**If-Match**: it needs the version that you have read. A member with `?` may be left out.
"""
TABLE = ["| request | query | body | answer |", "|---|---|---|---|"]


def document() -> dict[str, Any]:
    """OpenAPI 3.1, from the running code."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "esper_web.settings.test")
    import django

    django.setup()
    from django.core.management import call_command

    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        call_command("spectacular", format="openapi-json", file=file.name)
        made: dict[str, Any] = json.loads(Path(file.name).read_text(encoding="utf-8"))
    return made


def render(schema: dict[str, Any]) -> dict[Path, str]:
    """file -> its content."""
    text = json.dumps(schema, indent=1, ensure_ascii=False)
    return {DOCUMENT: f"{text}\n", PAGE: _page(schema)}


def _page(schema: dict[str, Any]) -> str:
    lines, area = [HEADER], ""
    for path, operations in sorted(schema["paths"].items(), key=lambda entry: entry[0].split("/")):
        for method in METHODS:
            if method not in operations:
                continue
            operation = operations[method]
            if operation["tags"][0] != area:
                area = operation["tags"][0]
                lines += [
                    f"\n## {area}\n",
                    "| request | query | body | answer |",
                    "|---|---|---|---|",
                ]
            lines.append(_row(schema, method, path, operation))
    return "\n".join([*lines, ""])


def _row(schema: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    parameters = operation.get("parameters", [])
    headers = {parameter["name"] for parameter in parameters if parameter["in"] == "header"}
    marks = [mark for mark, header in MARKS.items() if header in headers]
    query = [f"`{p['name']}`" for p in parameters if p["in"] == "query"]
    request = f"`{method.upper()} {path.removeprefix(PREFIX)}` {' '.join(marks)}".strip()
    cells = (request, ", ".join(query), _body(schema, operation), _answer(operation))
    return f"| {' | '.join(cells)} |"


MARKS = {"**act**": "Idempotency-Key", "**If-Match**": "If-Match"}


def _body(schema: dict[str, Any], operation: dict[str, Any]) -> str:
    content = operation.get("requestBody", {}).get("content", {})
    reference = content.get("application/json", {}).get("schema", {}).get("$ref", "")
    found = schema["components"]["schemas"].get(reference.rpartition("/")[2], {})
    required = found.get("required", [])
    return ", ".join(
        f"`{name}{'' if name in required else '?'}`" for name in found.get("properties", {})
    )


def _answer(operation: dict[str, Any]) -> str:
    return "; ".join(
        f"{status} {_schema_name(answer)}".strip()
        for status, answer in operation["responses"].items()
        if status != "default"
    )


def _schema_name(answer: dict[str, Any]) -> str:
    for kind, content in answer.get("content", {}).items():
        name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
        return f"`{name or kind}`"
    return ""


def differing(files: dict[Path, str]) -> Iterator[str]:
    for file, text in files.items():
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            yield file.name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    files = render(document())
    if check:
        return int(any(differing(files)))
    for file, text in files.items():
        file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
