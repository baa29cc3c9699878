"""The section of a model card that says how an architecture came about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from esper import blueprints
from esper.contracts import GraftKind
from esper.grafting.manifest import GraftRecord
from esper.version import __version__

CARD_FILE = "model_card.md"
_HEADER = f"""## How this architecture came about

Esper {__version__} added the modules below to the model while it trained. When a module was added,
the model computed what it had computed before, within the difference in the table.
"""
_FOOTER = """
`esper show ADAPTATION` prints what was proposed and why, who approved it, and what it changed; the
audit log of the server has the same.
"""


@dataclass(frozen=True, slots=True)
class Origin:
    """One graft of an exported model, from the oldest on.

    Attributes:
        record: how it was built.
        became: what the export made of it.
    """

    record: GraftRecord
    became: str


def origins_of(
    records: Iterable[GraftRecord], unmerged: Mapping[str, str], widened: Iterable[str]
) -> list[Origin]:
    """The grafts by their step.

    Args:
        unmerged: layer -> why its grafts became a ``GraftedLayer``.
        widened: the layers that have other shapes than in the model's class.
    """
    wider = set(widened)
    return [
        Origin(record, _became(record, unmerged, wider))
        for record in sorted(records, key=lambda record: record.step)
    ]


def section(origins: list[Origin]) -> str:
    """Markdown; empty for a model without grafts."""
    if not origins:
        return ""
    head = "| step | module | place | parameters | difference | in this model | adaptation |"
    return "\n".join([_HEADER, head, "|" + "---|" * 7, *map(_row, origins)]) + "\n" + _FOOTER


def _row(origin: Origin) -> str:
    record, certificate = origin.record, origin.record.certificate
    cells = (
        f"{record.step:,}" if record.step >= 0 else "not known",
        record.blueprint,
        _place(record),
        f"{certificate.parameters:,}",
        f"{certificate.max_abs_diff:.3g}",
        origin.became,
        record.adaptation or "by hand",
    )
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _place(record: GraftRecord) -> str:
    name, since = record.layer.name, record.layer.since
    return f"{since} … {name}" if since else name


def _became(record: GraftRecord, unmerged: Mapping[str, str], widened: set[str]) -> str:
    if blueprints.get_blueprint(record.blueprint).kind in (GraftKind.WRAP, GraftKind.OBSERVE):
        return "nothing: it acts in training only"
    if record.layer.since and record.layer.name in widened:
        return "more hidden units"
    if record.layer.name in unmerged:
        return "a GraftedLayer"
    return "merged into the layer's weights"
