"""Runs the whole matrix and writes ``docs/matrix.md``: ``python -m tests.matrix.report``.

Exits with 1 if any check failed.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from esper import blueprints
from tests.matrix.trial import WARM_STEPS, Outcome, all_outcomes, unchanged_losses, watched_losses
from tests.matrix.zoo import ZOO

TARGET = Path(__file__).parents[2] / "docs" / "matrix.md"
HEAD = """\
# The matrix: other people's models

The last result of `python -m tests.matrix.report`, which writes this file; `./check --all` runs the
same as tests. Every model is built tiny from its library's own definition, nothing is downloaded,
and nothing of it is edited.
"""
MODELS_HEAD = """\
## Models

*Watched*: training losses of an attached run that equal an unchanged copy's to the bit.
*Grafted*: a blueprint at a layer: grafted, trained on, undone hard; weights, buffers, ties,
gradients, optimizer and random streams then had the SHA-256 from before, and the next losses
equalled the unchanged run's to the bit. *Refused*: with a reason, before anything was changed.
"""
PACKAGES = ("torch", "transformers", "torchvision", "timm")


@dataclass
class Examined:
    """One model: observed, and with each blueprint."""

    name: str
    steps: int
    equal_watched: int
    equal_in_eval: bool
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        found = [f"{o.layer} / {o.blueprint}: {fault}" for o in self.outcomes for fault in o.faults]
        if self.equal_watched < WARM_STEPS + self.steps:
            found.append(f"watching alone changes the loss of step {self.equal_watched}")
        if not self.equal_in_eval:
            found.append("watching alone changes what eval mode gives")
        return found


def examine_specimen(name: str) -> Examined:
    specimen = ZOO[name]
    expected, in_eval = unchanged_losses(specimen)
    watched, watched_in_eval, _ = watched_losses(specimen)
    equal = next((i for i, (a, b) in enumerate(zip(expected, watched, strict=True)) if a != b),
                 len(expected))  # fmt: skip
    return Examined(
        name=name,
        steps=specimen.steps,
        equal_watched=equal,
        equal_in_eval=torch.equal(in_eval, watched_in_eval),
        outcomes=[*all_outcomes(specimen)],
    )


def _quietly(name: str) -> Examined:
    logging.getLogger("esper").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    return examine_specimen(name)


def main(names: list[str]) -> int:
    examined = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(os.cpu_count() or 1, 8), maxtasksperchild=1) as pool:
        for one in pool.imap_unordered(_quietly, names or list(ZOO)):
            examined.append(one)
            print(f"{one.name}: {len(one.outcomes)} tried, {len(one.faults)} faults", flush=True)  # noqa: T201
    examined.sort(key=lambda one: list(ZOO).index(one.name))
    for one in examined:
        for fault in one.faults:
            print(f"{one.name}: {fault}")  # noqa: T201
    if not names:  # a part is no result of the matrix
        TARGET.write_text("\n".join([*_lines(examined), ""]))
    return int(any(one.faults for one in examined))


def _lines(examined: list[Examined]) -> Iterator[str]:
    yield HEAD
    yield (
        f"Python {platform.python_version()}, "
        + ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
        + f"; {len(blueprints.list_blueprints())} blueprints; CPU, float32, one thread, AdamW."
    )
    yield ""
    yield from _models(examined)
    yield ""
    yield from _grid(examined)
    yield ""
    yield from _refusals(examined)


def _models(examined: list[Examined]) -> Iterator[str]:
    yield MODELS_HEAD
    yield "| model | library | what makes it hard | watched | grafted | refused | faults |"
    yield "|---|---|---|---|---|---|---|"
    for one in examined:
        specimen = ZOO[one.name]
        refused = sum(bool(outcome.refused) for outcome in one.outcomes)
        yield (
            f"| {one.name} | {specimen.library} | {specimen.trap} "
            f"| {one.equal_watched} of {WARM_STEPS + one.steps} "
            f"| {len(one.outcomes) - refused} | {refused} | {len(one.faults)} |"
        )


def _grid(examined: list[Examined]) -> Iterator[str]:
    slugs = sorted({outcome.blueprint for one in examined for outcome in one.outcomes})
    yield "## Model by blueprint"
    yield ""
    yield "*layers grafted* × *losses after the undo that equal the unchanged run's, at least*;"
    yield "– where the blueprint fits none of the layers that were tried: one or two of each kind."
    yield ""
    yield "| | " + " | ".join(slugs) + " |"
    yield "|---" * (len(slugs) + 1) + "|"
    for one in examined:
        yield f"| {one.name} | " + " | ".join(_cell(one, slug) for slug in slugs) + " |"


def _cell(one: Examined, slug: str) -> str:
    done = [o for o in one.outcomes if o.blueprint == slug and not o.refused]
    return f"{len(done)} × {min(o.equal_losses for o in done)}" if done else "–"


def _refusals(examined: list[Examined]) -> Iterator[str]:
    yield "## Why not"
    yield ""
    yield "| kind of layer | blueprints | reason |"
    yield "|---|---|---|"
    reasons: dict[tuple[str, str], set[str]] = {}
    for outcome in (o for one in examined for o in one.outcomes if o.refused):
        reasons.setdefault((outcome.kind, outcome.refused), set()).add(outcome.blueprint)
    for (kind, reason), slugs in sorted(reasons.items()):
        yield f"| {kind} | {_several(slugs)} | {reason.replace('|', '/')} |"


def _several(slugs: Iterable[str]) -> str:
    found = sorted(slugs)
    return "all" if len(found) == len(blueprints.list_blueprints()) else ", ".join(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
