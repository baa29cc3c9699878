"""Compositions: blueprints that consist of blueprints, described as a tree of slugs.

    parallel     side by side     y + Σ (m(x, y) - y)
    sequential   one after the other: the output of a member is the input of the next
                 y1 = a(x, y); y2 = b(y1, y1)
    assembly     as in one slot: a router, its experts, its capacity limit, its balancer

A composition is a :class:`Blueprint`, its costs are the sums of its members' costs, and it can be
used like any blueprint. It is data, a JSON document; the members are code of the catalogue.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from esper.blueprints import layout
from esper.blueprints.base import Blueprint, Graft, introduce
from esper.blueprints.experts import GatedBranch
from esper.blueprints.initial import Initializer
from esper.blueprints.routing import RouterBlueprint
from esper.contracts import GraftKind, LayerInfo, codec, risk_rank
from esper.exceptions import (
    CodecError,
    ConfigurationError,
    DuplicateBlueprintError,
    IncompatibleLayerError,
)

PARALLEL = "parallel"
SEQUENTIAL = "sequential"
ASSEMBLY = "assembly"
WAYS = (PARALLEL, SEQUENTIAL, ASSEMBLY)
MAX_BYTES = 64 * 1024
MAX_DEPTH = 4  # nesting of nodes, also through slugs
MAX_LEAVES = 16
MAX_TEXT = 500
TEXTS = ("title", "idea", "source", "when")
KEYS = frozenset({"slug", "id", "tree", *TEXTS})
_SLUG = re.compile(r"[a-z][a-z0-9_]{1,59}")
_ID = re.compile(r"(?=.{4,60}$)BP(-[A-Za-z0-9]+)+")
# A composition has the kind of the member that intervenes most.
_MILDEST_FIRST = (
    GraftKind.OBSERVE,
    GraftKind.WRAP,
    GraftKind.SCALE,
    GraftKind.PARALLEL,
    GraftKind.ASSEMBLY,
    GraftKind.REPLACE,
)

Document = Mapping[str, Any]


class Composite(Graft):
    """Grafts that are inserted and removed as one."""

    def __init__(self, way: str, members: Mapping[str, Graft]) -> None:
        super().__init__()
        self.way = way
        self.members = nn.ModuleDict(members)
        self.join(())

    def join(self, neighbours: Sequence[Graft]) -> None:
        """The members of an assembly know each other; the slot's other grafts are unknown."""
        if self.way == ASSEMBLY:
            introduce(self._grafts())

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        if self.way == PARALLEL:
            return self._side_by_side(x, y)
        for number, graft in enumerate(self._grafts()):
            y = graft.combine(y if number and self.way == SEQUENTIAL else x, y)
        return y

    def _side_by_side(self, x: Tensor, y: Tensor) -> Tensor:
        total = y
        for graft in self._grafts():
            total = total + (graft.combine(x, y) - y)
        return total

    def _grafts(self) -> tuple[Graft, ...]:
        return tuple(graft for graft in self.members.values() if isinstance(graft, Graft))

    def inherit(self, host: nn.Module) -> None:
        grafts = self._grafts()
        for graft in grafts[:1] if self.way == SEQUENTIAL else grafts:
            graft.inherit(host)

    def on_step(self) -> None:
        for graft in self._grafts():
            graft.on_step()

    def attach(self, host: nn.Module) -> None:
        for graft in self._grafts():
            graft.attach(host)

    def detach(self) -> None:
        for graft in self._grafts():
            graft.detach()

    def signals(self) -> dict[str, float]:
        return {name: value for graft in self._grafts() for name, value in graft.signals().items()}

    def forget(self) -> None:
        for graft in self._grafts():
            graft.forget()


class Composition(Blueprint):
    """A blueprint of blueprints; :func:`compose` creates a subclass for each.

    Attributes:
        way: parallel, sequential or assembly.
        members: by the name of their settings in the configuration.
        written: the canonical document; part of the version.
    """

    way: ClassVar[str]
    members: ClassVar[Mapping[str, Blueprint]]
    written: ClassVar[bytes]

    @cached_property
    def version(self) -> str:
        """First 16 hex digits of a SHA-256: this file, the document, the members' versions."""
        total = hashlib.sha256(Path(__file__).read_bytes())
        total.update(self.written)
        for member in self.members.values():
            total.update(member.version.encode())
        return total.hexdigest()[:16]

    @property
    def leaves(self) -> tuple[Blueprint, ...]:
        """The catalogue's blueprints at the leaves of the tree."""
        return tuple(leaf for member in self.members.values() for leaf in leaves_of(member))

    def supports(self, layer: LayerInfo) -> str:
        for _, member, place in self._places(layer):
            reason = member.supports(place)
            if reason:
                return f'its part "{member.title}" does not fit: {reason}'
        return ""

    def default_config(self, layer: LayerInfo) -> dict[str, Any]:
        return {name: m.default_config(place) for name, m, place in self._places(layer)}

    def sizes(self, layer: LayerInfo) -> tuple[dict[str, Any], ...]:
        sizes = {name: member.sizes(place) for name, member, place in self._places(layer)}
        count = max(map(len, sizes.values()))
        return tuple(
            {name: each[_at(number, count, len(each))] for name, each in sizes.items()}
            for number in range(count)
        )

    def config_for(self, layer: LayerInfo, given: dict[str, Any] | None = None) -> dict[str, Any]:
        reason = self.refusal(layer)
        if reason:
            raise IncompatibleLayerError(layer=layer.name, blueprint=self.slug, reason=reason)
        given = given or {}
        unknown = sorted(set(given) - set(self.members))
        if unknown:
            raise ConfigurationError(
                f"{self.slug} has no part {', '.join(unknown)}; it has: {', '.join(self.members)}"
            )
        for name, value in given.items():
            if not isinstance(value, dict):
                raise ConfigurationError(f"{name} takes a dict of settings, got {value!r}")
        return {n: m.config_for(place, given.get(n)) for n, m, place in self._places(layer)}

    def parameters(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return sum(m.parameters(place, config[n]) for n, m, place in self._places(layer))

    def flops(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        own = sum(m.flops(place, config[n]) for n, m, place in self._places(layer))
        return own + self._joining(layer, config)[0]

    def activation_bytes(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        kept = sum(m.activation_bytes(place, config[n]) for n, m, place in self._places(layer))
        if self.way != SEQUENTIAL:
            return kept + self._joining(layer, config)[1]
        # The inputs of later members are computed here and kept.
        rows = layout.position_count(layer, of_output=True)
        between = rows * layer.features_out * layout.dtype_bytes(layer)
        return kept + (len(self.members) - 1) * between

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        return Composite(
            self.way,
            {n: m.make(place, config[n], weights) for n, m, place in self._places(layer)},
        )

    def _joining(self, layer: LayerInfo, config: dict[str, Any]) -> tuple[int, int]:
        """(operations, kept bytes) of an assembly's experts due to its router."""
        experts = flops = kept = 0
        for name, member in self.members.items() if self.way == ASSEMBLY else ():
            if isinstance(member, RouterBlueprint):
                experts = int(config[name]["experts"])
            elif isinstance(member, GatedBranch):
                more = member.joining(layer, experts)
                flops, kept = flops + more[0], kept + more[1]
        return flops, kept

    def _places(self, layer: LayerInfo) -> Iterator[tuple[str, Blueprint, LayerInfo]]:
        """(name, member, the layer's description for that member)."""
        place = layer
        for name, member in self.members.items():
            yield name, member, place
            if self.way == SEQUENTIAL:
                place = output_of(layer)


def output_of(layer: LayerInfo) -> LayerInfo:
    """The description for a member whose input is the layer's output."""
    axes = max(0, len(layer.out_shape) - 2) if layer.channel_axis == 1 else 0
    return replace(
        layer,
        kind=f"Conv{axes}d" if axes else "Linear",
        channel_axis=1 if axes else -1,
        in_shape=layer.out_shape,
        features_in=layer.features_out,
        kernel_size=(1,) * axes,
        stride=(1,) * axes,
        padding=(0,) * axes,
        dilation=(1,) * axes,
        groups=1,
    )


def leaves_of(blueprint: Blueprint) -> tuple[Blueprint, ...]:
    return blueprint.leaves if isinstance(blueprint, Composition) else (blueprint,)


def clash(some: Iterable[Blueprint], others: Iterable[Blueprint]) -> bool:
    """True if they share a leaf, or two of their leaves conflict."""
    mine = {leaf.slug: leaf.conflicts for leaf in some}
    theirs = {leaf.slug: leaf.conflicts for leaf in others}
    return (
        not mine.keys().isdisjoint(theirs)
        or any(not theirs.keys().isdisjoint(conflicts) for conflicts in mine.values())
        or any(not mine.keys().isdisjoint(conflicts) for conflicts in theirs.values())
    )


# -- documents ---------------------------------------------------------------------------------


def read_documents(folder: Path) -> dict[str, Document]:
    """slug -> document of every ``<slug>.json`` in a folder.

    Raises:
        ConfigurationError: no such folder, or a file is not a composition; the message names it.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"{folder} is not a folder of compositions")
    return {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}


def _read(path: Path) -> Document:
    try:
        with path.open("rb") as file:  # limits what a bad file can cost
            raw = file.read(MAX_BYTES + 1)
        document = check_document(codec.decode(raw, max_bytes=MAX_BYTES))
    except (CodecError, OSError, ConfigurationError) as error:
        raise ConfigurationError(f"{path}: {error}") from error
    if document["slug"] != path.stem:
        raise ConfigurationError(
            f"{path}: the file must be named {document['slug']}.json, after its slug"
        )
    return document


def check_document(document: Any) -> Document:
    """Returns the document if its form is valid; slugs in the tree are looked up later.

    Raises:
        ConfigurationError: not an object, or a key is missing, unknown or invalid.
    """
    if not isinstance(document, dict) or set(document) != KEYS:
        raise ConfigurationError(f"a composition is an object with {', '.join(sorted(KEYS))}")
    if not isinstance(document["slug"], str) or not _SLUG.fullmatch(document["slug"]):
        raise ConfigurationError(
            "slug must have 2 to 60 characters of a-z, 0-9 and _, and start with a letter"
        )
    if not isinstance(document["id"], str) or not _ID.fullmatch(document["id"]):
        raise ConfigurationError(
            "id must be BP- and words of letters and digits, at most 60 characters"
        )
    for key in TEXTS:
        text = document[key]
        if not (isinstance(text, str) and 0 < len(text) <= MAX_TEXT and text.isprintable()):
            raise ConfigurationError(
                f"{key} must be a printable text of at most {MAX_TEXT} characters"
            )
    return document


def compose(
    documents: Mapping[str, Document], known: Mapping[str, Blueprint]
) -> dict[str, Blueprint]:
    """slug -> composition of each document. Trees may name known blueprints and each other.

    Raises:
        ConfigurationError: an unknown slug, a cycle, a conflict inside a tree, a tree that is too
            deep or too large, a member in the wrong place. The message names the place.
        DuplicateBlueprintError: a slug or id is taken.
    """
    found = _Composer(documents, known)
    return {slug: found.blueprint(slug, (slug,)) for slug in sorted(documents)}


@dataclass(slots=True)
class _Node:
    """A node of a tree and its place, for messages."""

    way: str
    members: dict[str, Blueprint]
    path: tuple[str, ...]

    def refuse(self, why: str) -> ConfigurationError:
        return ConfigurationError(f"composition {' → '.join(self.path)}: {why}")


class _Composer:
    """Looks up slugs, builds each document once, and tracks the path."""

    def __init__(self, documents: Mapping[str, Document], known: Mapping[str, Blueprint]) -> None:
        self._documents = documents
        self._known = dict(known)
        self._ids = {blueprint.id: slug for slug, blueprint in known.items()}
        for slug in documents.keys() & known.keys():
            raise DuplicateBlueprintError(f"{slug} occurs twice in the catalogue", slug=slug)

    def blueprint(self, slug: str, path: tuple[str, ...]) -> Blueprint:
        if slug in self._known:
            return self._known[slug]
        if slug not in self._documents:
            where = " → ".join(path)
            raise ConfigurationError(f"composition {where}: no blueprint has the slug {slug!r}")
        document = self._documents[slug]
        tree = self._node(document["tree"], path)
        taken = self._ids.setdefault(document["id"], slug)
        if taken != slug:
            raise DuplicateBlueprintError(f"{document['id']} is the id of {taken}", slug=slug)
        found = _make(document, tree, self._known.values())
        self._known[slug] = found
        return found

    def _node(self, node: Any, path: tuple[str, ...]) -> _Node:
        where = " → ".join(path)
        if len(path) > MAX_DEPTH:
            raise ConfigurationError(f"composition {where}: deeper than {MAX_DEPTH} levels")
        if not isinstance(node, dict) or len(node) != 1 or not node.keys() <= set(WAYS):
            raise ConfigurationError(f"composition {where}: a node is one of {', '.join(WAYS)}")
        way, listed = next(iter(node.items()))
        if not isinstance(listed, list) or not 2 <= len(listed) <= MAX_LEAVES:
            raise ConfigurationError(f"composition {where}: {way} takes 2 to {MAX_LEAVES} members")
        members: dict[str, Blueprint] = {}
        for entry in listed:
            name, member = self._member(entry, path, number=len(members) + 1)
            members[_free_name(name, members)] = member
        found = _Node(way, members, path)
        _check(found)
        return found

    def _member(self, entry: Any, path: tuple[str, ...], number: int) -> tuple[str, Blueprint]:
        if isinstance(entry, str):
            if entry in path:
                raise ConfigurationError(f"composition {' → '.join((*path, entry))}: a cycle")
            return entry, self.blueprint(entry, (*path, entry))
        name = f"part_{number}"
        tree = self._node(entry, (*path, name))
        texts = {**dict.fromkeys(TEXTS, ""), "title": f"part {number}, {tree.way}"}
        document = {"slug": f"{path[0]}.{name}", "id": "", "tree": entry, **texts}
        return name, _make(document, tree, ())


def _check(node: _Node) -> None:
    """Raises if these members cannot be combined in this way."""
    whole = [leaf for member in node.members.values() for leaf in leaves_of(member)]
    if len(whole) > MAX_LEAVES:
        raise node.refuse(f"{len(whole)} parts in total; at most {MAX_LEAVES} are accepted")
    if max(map(_depth, node.members.values())) + len(node.path) > MAX_DEPTH + 1:
        raise node.refuse(f"deeper than {MAX_DEPTH} levels")
    for leaf in whole:
        others = {other.slug for other in whole} & leaf.conflicts
        if others:
            raise node.refuse(f"{leaf.slug} conflicts with {', '.join(sorted(others))}")
        if leaf.kind is GraftKind.DISTRIBUTED:
            raise node.refuse(f"{leaf.slug} works between processes, not at a layer")
    _check_siblings(node)


def _check_siblings(node: _Node) -> None:
    before: set[str] = set()
    for member in node.members.values():
        if node.way != SEQUENTIAL and member.slug in before:
            raise node.refuse(f"{member.slug} occurs twice")
        if member.requires and (node.way != ASSEMBLY or not member.requires & before):
            needed = " or ".join(sorted(member.requires))
            raise node.refuse(f"{member.slug} needs {needed} before it, in an assembly")
        before.add(member.slug)
    leads = [m for m in node.members.values() if m.kind is GraftKind.ASSEMBLY and not m.requires]
    if node.way == ASSEMBLY and not leads:
        raise node.refuse("an assembly needs a router")


def _depth(blueprint: Blueprint) -> int:
    if not isinstance(blueprint, Composition):
        return 0
    return 1 + max(map(_depth, blueprint.members.values()))


def _make(document: Document, tree: _Node, others: Iterable[Blueprint]) -> Composition:
    """A blueprint's attributes are class attributes, so each composition gets its own class."""
    leaves = [leaf for member in tree.members.values() for leaf in leaves_of(member)]
    facts = {
        "__module__": __name__,
        **{key: document[key] for key in ("slug", "id", *TEXTS)},
        "way": tree.way,
        "members": tree.members,
        "written": codec.encode(dict(document)),
        "parts": len(leaves),
        "category": leaves[0].category,
        "adaptation_type": leaves[0].adaptation_type,
        "kind": max((leaf.kind for leaf in leaves), key=_MILDEST_FIRST.index),
        "risk": max((leaf.risk for leaf in leaves), key=risk_rank),
        "tolerance": max(leaf.tolerance for leaf in leaves),
        "tunes": tuple(f"{part}.{one}" for part, m in tree.members.items() for one in m.tunes),
        "trainable": any(leaf.trainable for leaf in leaves),
        "scaler_refusal": next((x.scaler_refusal for x in leaves if x.scaler_refusal), ""),
        "replicas_refusal": next((x.replicas_refusal for x in leaves if x.replicas_refusal), ""),
        "conflicts": frozenset(b.slug for b in others if clash(leaves, leaves_of(b))),
    }
    made: Composition = type("Composition", (Composition,), facts)()
    return made


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    number = 2
    free = name
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free


def _at(number: int, count: int, length: int) -> int:
    """The index among ``length`` sizes that matches index ``number`` of ``count``."""
    return length - 1 if count == 1 else round(number * (length - 1) / (count - 1))
