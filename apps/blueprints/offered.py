"""What the installed code offers, as rows of the two catalogues.

``offered.json`` has the rows with the digest of the file that each of them comes from. As long as
they are the digests of the files that are there, nobody has to import torch to know the rows: that
takes longer than all else that a start prepares. ``python -m scripts.offered_rows`` writes it.
"""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import esper

WRITTEN = Path(__file__).with_name("offered.json")
SOURCES = Path(esper.__file__).parent

Rows = dict[str, dict[str, Any]]


class Offered(NamedTuple):
    """The values of each blueprint's and each remedy's row, by slug."""

    blueprints: Rows
    remedies: Rows


class Written(TypedDict):
    """``offered.json``: ``sources`` has the digest of each file, by its path in ``esper``."""

    sources: dict[str, str]
    blueprints: Rows
    remedies: Rows


def offered() -> Offered:
    """The rows, without torch where the installed files are those that were written down."""
    written: Written = json.loads(WRITTEN.read_text(encoding="utf-8"))
    if os.environ.get("ESPER_COMPOSITIONS") or written["sources"] != digests_of_sources():
        return offered_by_code()
    return Offered(written["blueprints"], written["remedies"])


def digests_of_sources() -> dict[str, str]:
    """The digest of each file that defines a blueprint or a remedy."""
    files = (
        *(SOURCES / "blueprints" / "catalog").glob("*.py"),
        *(SOURCES / "blueprints" / "compositions").glob("*.json"),
        *(SOURCES / "remedies" / "catalog").glob("*.py"),
    )
    return {
        file.relative_to(SOURCES).as_posix(): sha256(file.read_bytes()).hexdigest()[:16]
        for file in sorted(files)
    }


def offered_by_code() -> Offered:
    """The rows from the classes themselves, which imports torch."""
    from esper.blueprints import list_blueprints
    from esper.remedies import list_remedies

    blueprints: Rows = {
        blueprint.slug: {
            "ident": blueprint.id,
            "title": blueprint.title,
            "category": blueprint.category,
            "kind": blueprint.kind,
            "adaptation_type": blueprint.adaptation_type,
            "risk": blueprint.risk,
            "mergeable": blueprint.mergeable,
            "idea": blueprint.idea,
            "source": blueprint.source,
            "when": blueprint.when,
            "conflicts": sorted(blueprint.conflicts),
            "requires": sorted(blueprint.requires),
            "tunes": list(blueprint.tunes),
            "version": blueprint.version,
        }
        for blueprint in list_blueprints()
    }
    remedies: Rows = {
        remedy.slug: {
            "title": remedy.title,
            "phrase": remedy.phrase or remedy.title,
            "idea": remedy.idea,
            "source": remedy.source,
            "when": remedy.when,
            "risk": remedy.risk,
            "changes_weights": remedy.changes_weights,
            "stays": remedy.stays,
            "asks": remedy.asks,
            "scope": remedy.scope,
            "settings": remedy.default_config(),
        }
        for remedy in list_remedies()
    }
    return Offered(blueprints, remedies)
