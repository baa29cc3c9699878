"""Finds the blueprints: the catalogue, the compositions, and those that a user adds.

    catalog/<slug>.py            one blueprint in each
    compositions/<slug>.json     trees of them
    $ESPER_COMPOSITIONS/*.json   a user's own trees
    register(…)                  a user's own blueprint or tree, in this process

Nothing depends on the order of files: :func:`list_blueprints` sorts by slug.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType

from esper.blueprints import catalog
from esper.blueprints.base import Blueprint
from esper.blueprints.composition import Document, check_document, compose, read_documents
from esper.catalog_files import entry_of, modules_of
from esper.exceptions import ConfigurationError, DuplicateBlueprintError, UnknownBlueprintError
from esper.near_names import did_you_mean

IN_TREE = Path(__file__).parent / "compositions"
_registered: dict[str, Blueprint] = {}


def list_blueprints() -> tuple[Blueprint, ...]:
    """Every blueprint, compositions too, sorted by slug."""
    return tuple(_by_slug().values())


def get_blueprint(slug_or_id: str) -> Blueprint:
    """One blueprint by slug ("proj_lora_64") or id ("BP-PROJ-LoRA-64").

    Raises:
        UnknownBlueprintError: no blueprint has this slug or id.
    """
    found = _by_slug().get(slug_or_id) or next(
        (blueprint for blueprint in list_blueprints() if blueprint.id == slug_or_id), None
    )
    if found is None:
        known, ids = list(_by_slug()), [blueprint.id for blueprint in list_blueprints()]
        raise UnknownBlueprintError(
            f"no blueprint {slug_or_id!r}{did_you_mean(slug_or_id, [*known, *ids])}; "
            f"known are: {', '.join(known)}",
            slug=slug_or_id,
        )
    return found


def catalogue() -> tuple[Blueprint, ...]:
    """The blueprints in code, without compositions; sorted by slug."""
    return tuple(_catalogue().values())


def register(new: Blueprint | Document) -> Blueprint:
    """Registers a blueprint, or a composition's document, in this process.

    Raises:
        ConfigurationError: the document is not a composition.
        DuplicateBlueprintError: its slug or id is taken.
    """
    known = dict(_by_slug())
    if isinstance(new, Blueprint):
        _refuse_taken(new, known.values())
        found = new
    else:
        document = check_document(dict(new))
        found = compose({document["slug"]: document}, known)[document["slug"]]
    _registered[found.slug] = found
    _by_slug.cache_clear()
    return found


def discover(modules: Iterable[ModuleType]) -> dict[str, Blueprint]:
    """slug -> blueprint, sorted.

    Raises:
        DuplicateBlueprintError: a slug is not its file's name, a file does not define exactly
            one blueprint, or two have the same slug or id.
    """
    found: dict[str, Blueprint] = {}
    for module in modules:
        blueprint = _blueprint_of(module)
        _refuse_taken(blueprint, found.values())
        found[blueprint.slug] = blueprint
    return dict(sorted(found.items()))


def _refuse_taken(new: Blueprint, others: Iterable[Blueprint]) -> None:
    if any(new.slug == other.slug or new.id == other.id for other in others):
        raise DuplicateBlueprintError(
            f"{new.slug} ({new.id}) occurs twice in the catalogue", slug=new.slug
        )


@cache
def _by_slug() -> dict[str, Blueprint]:
    documents = read_documents(IN_TREE)
    folder = os.environ.get("ESPER_COMPOSITIONS", "")
    own = read_documents(Path(folder)) if folder else {}
    for slug in own.keys() & documents.keys():
        raise DuplicateBlueprintError(f"{slug} occurs twice in the catalogue", slug=slug)
    known = _catalogue()
    found = {**known, **compose({**documents, **own}, known), **_registered}
    return dict(sorted(found.items()))


@cache
def _catalogue() -> dict[str, Blueprint]:
    return discover(modules_of(catalog))


def _blueprint_of(module: ModuleType) -> Blueprint:
    try:
        blueprint: Blueprint = entry_of(module, Blueprint)
    except ConfigurationError as error:
        raise DuplicateBlueprintError(str(error), slug=module.__name__) from None
    return blueprint
