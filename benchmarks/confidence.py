"""How often adaptations really help, and whether the confidence says so.

    python -m benchmarks.confidence [--quick] [--grafts 1000:1100] [--narrow 3000:3040]
                                    [--remedies 1000:1040] [--cases FILE] [--ship]
                                    [--document docs/confidence.md]

Trains pairs (:mod:`benchmarks.confidence_cases`), adds their cases to ``--cases``, fits the
confidence and measures it on trainings that it was not fitted on: ten folds of whole trainings, and
each kind of host, data set and kind of fault held out. ``--ship`` writes the table and the model
that the library brings. Without seeds, only what is in the file is fitted and measured.
"""

from __future__ import annotations

import argparse
import json
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score

import esper.policy
from benchmarks.confidence_cases import graft_cases, narrow_cases, remedy_cases
from benchmarks.confidence_fit import HeldOut, cross_validated, fit
from benchmarks.rescue.faults import at8
from esper.policy.calibration import FEWEST_CASES, calibration
from esper.policy.cases import Case, read, write

GOAL = 0.05  # of the calibration error
SHIPPED = Path(esper.policy.__file__).parent
MAKERS: dict[str, Callable[[int], Iterable[Case]]] = {
    "graft": graft_cases,
    "narrow": narrow_cases,
    "remedy": remedy_cases,
}
KINDS = {"narrow": "graft"}  # of the cases, where it is not the maker's name


def data_set(case: Case) -> str:
    """Of a remedy's case, whose ``host`` is the kind of fault that its training was given."""
    return at8.drawn_data(case.host, at8.dice_of(case.host, case.seed))


host = operator.attrgetter("host")
# By kind of case: what is held out as a whole; its name of many, of one, and how it is read.
GROUPS: dict[str, tuple[tuple[str, str, Callable[[Case], str]], ...]] = {
    "graft": (("kinds of hosts", "one kind of host", host),),
    "remedy": (
        ("data sets", "one data set, with its models", data_set),
        ("kinds of faults", "one kind of fault, with its findings", host),
    ),
}
NOTES = {
    "remedy": (
        "",
        "A run of a user has data that are in no case: the row of the data set says what to expect",
        "for a finding of the table. A finding that the table lacks is as in the last row: neither",
        "it nor the remedy as its answer has a case, what other faults have in common is all that",
        "is known, and what is said is mostly too low.",
    )
}


def collect(seeds: dict[str, range], path: Path | None) -> list[Case]:
    """The cases of a file, and those of the seeds that it does not have."""
    cases = read(path) if path is not None else []
    done = {(case.kind, case.seed) for case in cases}
    for kind, make in MAKERS.items():
        for seed in seeds[kind]:
            if (KINDS.get(kind, kind), seed) in done:
                continue
            found = list(make(seed))
            cases += found
            print(f"{kind} {seed}: {len(found)} cases", flush=True)
            if path is not None:
                write(path, cases)
    return cases


def ship(cases: Sequence[Case]) -> None:
    """Writes what the library brings: the table, and the model fitted on it."""
    write(SHIPPED / "cases.csv", cases)
    cases = read(SHIPPED / "cases.csv")  # as rounded there
    models = {
        kind: fit([case for case in cases if case.kind == kind]).to_wire()
        for kind in MAKERS
        if any(case.kind == kind for case in cases)
    }
    text = json.dumps(models, indent=None, separators=(",", ":"))
    (SHIPPED / "confidence.json").write_text(text + "\n")


def document(cases: Sequence[Case]) -> str:
    """The report as Markdown."""
    lines = list(HEAD)
    for kind in MAKERS:
        own = [case for case in cases if case.kind == kind]
        if own:
            lines += _section(kind, own)
    return "\n".join(lines) + "\n"


HEAD = (
    "# Whether confidence is right",
    "",
    "Written by `python -m benchmarks.confidence --document docs/confidence.md`. Nothing here is",
    "edited by hand.",
    "",
    "Confidence is the probability that an adaptation really helps: that a graft lowers the",
    "held-out loss by more than 0.5 % against a twin that was trained without it on the same",
    "batches, or that the symptom of a remedy's finding goes and stays away. It comes from cases",
    "of small models on a CPU, which the library brings in `esper/policy/cases.csv`, and from the",
    "closed cases of the installation. All numbers below are of cases that the model was not",
    "fitted on.",
)


def _section(kind: str, cases: Sequence[Case]) -> list[str]:
    trainings = len({case.training for case in cases})
    groups = GROUPS[kind]
    counts = ", ".join(f"{len(set(map(by, cases)))} {many}" for many, _, by in groups)
    base = sum(case.success for case in cases) / len(cases)
    lines = [
        "",
        f"## {kind.capitalize()}s" if kind == "graft" else "## Remedies",
        "",
        f"{len(cases)} cases of {trainings} trainings, {counts}; {base:.0%} helped, the base rate.",
        "",
        "| held out | cases | Brier score | base rate's | calibration error | AUC | "
        "trainings inside their 95 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    by_training = cross_validated(cases)
    lines.append(_row("a tenth of the trainings", by_training))
    lines += [
        _row(one, cross_validated(cases, by=by, folds=0))
        for _, one, by in groups
        if len(set(map(by, cases))) > 1
    ]
    found = calibration(by_training.said, by_training.came_true)
    reached = "reached" if found.ece < GOAL and found.cases >= 200 else "**missed**"
    lines += [
        "",
        f"Goal, a calibration error below {GOAL} on at least 200 held-out cases: {reached}.",
        *NOTES.get(kind, ()),
        "",
        "| said | cases | mean of what was said | came true |",
        "|---|---|---|---|",
        *(
            f"| {b.low:.1f} to {b.high:.1f} | {b.cases} | {b.said:.2f} | {b.came_true:.2f} |"
            for b in found.bins
        ),
        "",
        "| adaptation | cases | mean of what was said | came true | |",
        "|---|---|---|---|---|",
        *_by_choice(by_training),
    ]
    return lines


def _row(name: str, held_out: HeldOut) -> str:
    found = calibration(held_out.said, held_out.came_true)
    inside, trainings = held_out.inside
    both = len(set(held_out.came_true)) == 2
    auc = f"{roc_auc_score(held_out.came_true, held_out.said):.2f}" if both else "none"
    return (
        f"| {name} | {found.cases} | {found.brier:.3f} | {found.base:.3f} | {found.ece:.3f} | "
        f"{auc} | {inside} of {trainings} |"
    )


def _by_choice(held_out: HeldOut) -> Iterable[str]:
    for choice in sorted({case.choice for case in held_out.cases}):
        places = [i for i, case in enumerate(held_out.cases) if case.choice == choice]
        said = sum(held_out.said[i] for i in places) / len(places)
        true = sum(held_out.came_true[i] for i in places) / len(places)
        few = "too few to trust" if len(places) < FEWEST_CASES else ""
        yield f"| {choice} | {len(places)} | {said:.2f} | {true:.2f} | {few} |"


def _seeds(text: str) -> range:
    first, _, last = text.partition(":")
    return range(int(first), int(last)) if text else range(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="four trainings, two faulty runs")
    parser.add_argument("--grafts", default="", help="seeds, such as 1000:1100")
    parser.add_argument("--narrow", default="", help="seeds of narrow runs, such as 3000:3040")
    parser.add_argument("--remedies", default="", help="seeds, such as 1000:1040")
    parser.add_argument("--cases", type=Path, help="the table so far; new cases are added to it")
    parser.add_argument("--ship", action="store_true", help="write what the library brings")
    parser.add_argument("--document", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    grafts = "1000:1004" if given.quick else given.grafts
    remedies = "1000:1002" if given.quick else given.remedies
    path = given.cases or (None if given.quick else SHIPPED / "cases.csv")
    seeds = {
        "graft": _seeds(grafts),
        "narrow": _seeds(given.narrow),
        "remedy": _seeds(remedies),
    }
    cases = collect(seeds, path)
    if given.ship:
        ship(cases)
    text = document(cases)
    print(text)
    if given.document:
        given.document.write_text(text)


if __name__ == "__main__":
    main()
