"""Runs with a fault: what Esper finds in them, and which of them recover.

``python -m benchmarks.rescue [--quick] [--seeds 100:125] [--minutes 25] [--json FILE]``

One torch thread, local mode. The tiers, and what the columns mean, stand in docs/rescue.md, which
``--docs`` writes. Limits of the rules were chosen on seeds 0 to 9; seeds from 100 on are for
reports.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, zip_longest
from pathlib import Path

import torch

from benchmarks.rescue import report
from benchmarks.rescue.arms import (
    Esper,
    PlateauAndClip,
    RandomRemedies,
    ZClip,
    oracle,
    restart,
)
from benchmarks.rescue.cases import Case
from benchmarks.rescue.faults import at8, clean, deform, silent12, so35
from benchmarks.rescue.measures import NOT_LEARNED, POINTS, Record
from benchmarks.rescue.training import LONGER, Arm, Outcome, train

AT_8_STEPS, SILENT_STEPS, CLEAN_STEPS = 500, 120, 1500
TIERS = (at8.TIER, so35.TIER, silent12.TIER, deform.TIER, clean.TIER)
SELDOM = ("restart", "oracle")  # of each second seed, because they train several times
ARMS = ("automatic", "supervised", "random", "healthy", "plateau", "zclip", "restart", "oracle")
OTHER_BATCHES = 1000  # added to the seed of the twin that is trained again


def measure(case: Case, arms: tuple[str, ...], twins: dict[object, Outcome]) -> Record:
    """Trains the twin and the run with the fault, the latter under each arm.

    Args:
        twins: those that were trained already; one may be the twin of several cases.
    """
    key = (case.tier, case.name.split()[0], case.seed)
    shared = case.tier not in (at8.TIER, clean.TIER)
    watched = twins.get(key) if shared else None
    is_new = watched is None
    if watched is None:
        watched = train(case.healthy(), case.steps, case.seed, Esper("observe"))
        twins[key] = watched
    record = Record.of(case, watched)
    if not is_new:
        record.alarms, record.clean_steps = {}, 0
    if case.tier == clean.TIER:
        return record
    if not watched.score >= case.learned:
        record.why_not = NOT_LEARNED
        return record
    steps = round(case.steps * LONGER)
    # What Esper observes is equal to the bit to the run left alone.
    seen = record.arms["observe"] = train(case.faulty(), steps, case.seed, Esper("observe"))
    record.hurts = not seen.score >= watched.score - POINTS
    if not record.hurts and not case.by_definition:
        record.why_not = "the fault does no harm"
        return record
    record.counts = True
    if not case.bug and arms:
        record.arms["nothing"] = train(case.faulty(), steps, case.seed, Arm())
        # Without Esper, and as long as the twin.
        record.twin_cpu_s = record.arms["nothing"].cpu_s / LONGER
        for arm in arms:
            if arm not in SELDOM or not case.seed % 2:
                record.arms[arm] = under(arm, case, record)
    return record


def under(arm: str, case: Case, record: Record) -> Outcome:
    """The run with the fault, under one of :data:`ARMS`."""
    steps, wanted = round(case.steps * LONGER), record.twin - POINTS
    if arm == "healthy":
        return train(case.healthy(), steps, case.seed + OTHER_BATCHES, Arm())
    if arm == "restart":
        return restart(case, wanted, record.told_at)
    if arm == "oracle":
        return oracle(case, wanted)
    if arm == "random":
        automatic = record.arms.get("automatic", Outcome())
        at = [step for step, *_ in automatic.remedies]
        return train(case.faulty(), steps, case.seed, RandomRemedies(at, case.seed))
    made = {"plateau": PlateauAndClip, "zclip": ZClip}
    chosen = made[arm]() if arm in made else Esper(arm)
    return train(case.faulty(), steps, case.seed, chosen)


def at8_cases(seeds: range) -> Iterator[Case]:
    """Seed by seed through all kinds, so that a run that is cut short has some of each."""
    kinds = [at8.cases(kind, seeds, AT_8_STEPS) for kind in at8.AT_8]
    found = chain.from_iterable(zip_longest(*kinds))
    return (case for case in found if case is not None)


def cases_of(tier: str, seeds: range, *, quick: bool) -> Iterator[Case]:
    """The cases of one tier."""
    if tier == at8.TIER:
        yield from at8_cases(seeds)
    elif tier == so35.TIER:
        yield from so35.cases(seeds.start)
    elif tier == silent12.TIER:
        yield from silent12.cases(seeds.start, SILENT_STEPS)
    elif tier == deform.TIER:
        yield from deform.cases(seeds[:1])
    else:
        yield from clean.cases(seeds.start, CLEAN_STEPS // (10 if quick else 1))


def run(arguments: argparse.Namespace) -> list[Record]:
    """All cases of the chosen tiers, AT-8 last, until the time is over."""
    first, end = map(int, arguments.seeds.split(":"))
    seeds = range(first, first + 1) if arguments.quick else range(first, end)
    arms = ("automatic", "random") if arguments.quick else tuple(arguments.arms.split(","))
    started = time.monotonic()
    deadline = started + 60 * arguments.minutes
    records: list[Record] = []
    twins: dict[object, Outcome] = {}
    for tier in reversed(arguments.tiers.split(",")):
        for case in cases_of(tier, seeds, quick=arguments.quick):
            if time.monotonic() > deadline:
                break
            records.append(measure(case, arms if tier == at8.TIER else (), twins))
            print(report.line(records[-1]), flush=True)
            if arguments.json:
                save(records, report.about(arguments.seeds, time.monotonic() - started), arguments)
    return records


def save(records: list[Record], about: str, arguments: argparse.Namespace) -> None:
    content = {"about": about, "records": [asdict(record) for record in records]}
    arguments.json.write_text(json.dumps(content, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, and the arms that matter")
    parser.add_argument("--seeds", default="100:125", help="first:end")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no new case after these")
    parser.add_argument("--tiers", default=",".join(TIERS))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--json", type=Path, help="where the records go")
    parser.add_argument("--docs", type=Path, help="folder for rescue.md and its plots")
    parser.add_argument(
        "--records",
        type=Path,
        nargs="+",
        help="report these, and run nothing; later ones replace arms of earlier ones",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("esper").setLevel(logging.CRITICAL)
    if arguments.records:
        saved = [json.loads(path.read_text()) for path in arguments.records]
        parts = [[Record.from_json(entry) for entry in part["records"]] for part in saved]
        records = report.join(parts)
        about = report.origins([part["about"] for part in saved], parts)
    else:
        started = time.monotonic()
        records = run(arguments)
        about = report.origin(report.about(arguments.seeds, time.monotonic() - started), records)
    print("\n".join(report.table(records)))
    if arguments.docs:
        report.write(records, about, arguments.docs)


if __name__ == "__main__":
    main()
