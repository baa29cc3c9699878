"""The report: tables for a terminal, and ``benefit.md``."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import numpy as np

from benchmarks.benefit.adapters import Placed
from benchmarks.benefit.idle import Idle
from benchmarks.benefit.narrow import AT_MOST, FURTHER, RESTARTED, SCRATCH, Record
from benchmarks.benefit.statistics import FEWEST, SMALLEST, Comparison, compare, holm, worst

LEFT, RATE, RESTART = "left alone", "rate alone", "larger net, equal steps"
FLOPS, CPU = "larger net, equal FLOPs", "larger net, equal CPU time"
CLOCK, MOVED = "clock, random", "another layer"
ARMS = (LEFT, RATE, CLOCK, MOVED, RESTART, FLOPS, CPU)
WIDE_ARMS = (LEFT, RATE, RESTART, FLOPS, CPU)
OWN, PLACED_ARMS = (
    "Esper's layers",
    ("evenly", "rate alone", "random layers", "Esper's last layers"),
)
GOAL_BETTER, GOAL_IDLE = 0.9, 0.01

HEAD = f"""# Does it pay?

Written by `python -m benchmarks.benefit --document docs/benefit.md`. Nothing here is edited by
hand. `--quick` runs one seed.

Esper is compared with what its cost would buy otherwise. A gain is 1 - Esper's held-out loss / the
other arm's, on rows that neither the training nor Esper saw: the mean of the last five scores, with
a 95 % bootstrap interval over runs (hosts are kept, seeds are drawn).

- **pays**: a gain of more than {SMALLEST:.1%} is shown. **does not pay**: less than that is shown.
  **cannot tell**: neither, or fewer than {FEWEST} runs. Sign-flip test against {SMALLEST:.1%}, with
  Holm's correction over the comparisons of a table, at 5 %.
- These thresholds, the arms and the hosts were set before the reported seeds were run. Each net has
  the learning rate of a grid that was best on seeds 0 to 2; `text, tanh` has those of `text`.
- Esper acts alone here. What it is not sure enough of waits for a person, who never answers: that
  run counts as it is. `grafted` below says in how many runs of each host it went alone.
- **{RATE}** is the best of three changed rates (0.1, 0.3, 3), chosen afterwards by its result.
- **{CLOCK}**: a random blueprint (no experts), size and layer at the moment of Esper's first graft,
  and one more each thousand steps. **{MOVED}**: Esper's first blueprint and size at another layer;
  only where Esper grafted, and another layer takes it.
- **larger net**: begins anew with as many units as Esper adds by default. Equal FLOPs count matrix
  products of training steps and of every evaluation that Esper made; the statistics of health
  frames are in the CPU time only. The tuning of its rate is not counted.
- The hosts are tiny, so a training step costs little and Esper's own work weighs most here. GroMo
  was not run.
"""


def lines(
    records: Sequence[Record],
    placed: Sequence[Placed],
    idle: Sequence[Idle],
    same: Sequence[bool],
) -> Iterator[str]:
    """Everything but the head and the goals."""
    for title, found in tables(records, placed):
        if found:
            yield from _table(title, found)
    yield from _hosts(records)
    yield from _worse(records)
    yield from _idle(idle, same)


def tables(
    records: Sequence[Record], placed: Sequence[Placed]
) -> list[tuple[str, list[Comparison]]]:
    narrow = [record for record in records if record.narrow]
    wide = [record for record in records if not record.narrow]
    return [
        ("Sunk run", _compared(narrow, ARMS, lambda r: r.sunk)),
        ("From scratch, too narrow", _compared(narrow, ARMS, lambda r: r.scratch)),
        ("From scratch, wide enough", _compared(wide, WIDE_ARMS, lambda r: r.scratch)),
        ("Adapters", _adapters(placed)),
    ]


def _compared(
    records: Sequence[Record], arms: Iterable[str], losses: Callable[[Record], dict[str, float]]
) -> list[Comparison]:
    if not records:
        return []
    found = []
    for arm in arms:
        gains = defaultdict(list)
        for record in records:
            own = losses(record)
            gains[record.host].append(gain(own["Esper"], own.get(arm, math.nan)))
        found.append(compare(arm, gains))
    return holm(found)


def _adapters(placed: Sequence[Placed]) -> list[Comparison]:
    if not placed:
        return []
    found = []
    for arm in PLACED_ARMS:
        gains = defaultdict(list)
        for one in placed:
            gains[one.task].append(gain(one.losses[OWN], one.losses[arm]))
        found.append(compare(arm, gains))
    return holm(found)


def gain(own: float, other: float) -> float:
    """A share of the other loss."""
    return 1 - own / other if other else math.nan


_ABOUT = {
    "Sunk run": f"A net with too few hidden units is trained until Esper's first graft, or for "
    f"{AT_MOST:,} steps without one. From there all arms have {FURTHER:,} further steps.",
    "From scratch, too narrow": f"The same runs after {SCRATCH:,} steps from the first one. The "
    f"larger net was trained for {RESTARTED:,} steps; where more would cost the same, its end is "
    "read.",
    "From scratch, wide enough": "Three tables of scikit-learn, with nets that need nothing.",
    "Adapters": "A trained net is fitted to another task by low-rank updates; all arms add as many "
    "parameters. Esper's ranking of layers places them on the first half of the layers. In a run, "
    "Esper places none: it grafts only where a finding says that capacity is missing.",
}


def _table(title: str, found: Sequence[Comparison]) -> Iterator[str]:
    yield from ("", f"## {title}: {_verdict(found)}", "", _ABOUT[title], "")
    yield "| against | gain | 95 % | better in | runs | p, Holm | verdict |"
    yield "|---|---|---|---|---|---|---|"
    for one in found:
        seen = f"{_percent(one.gain)} | {_percent(one.low)} to {_percent(one.high)}"
        better = "-" if math.isnan(one.better) else f"{one.better:.0%}"
        yield (
            f"| {one.arm} | {seen} | {better} | {one.runs} | {one.chance:.3f} | **{one.word}** |"
        )


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:+.1%}"


def _verdict(found: Sequence[Comparison]) -> str:
    """The worst of equal FLOPs and equal CPU time; without these, the worst of all but the last."""
    costs = [one.word for one in found if one.arm in (FLOPS, CPU)]
    words = costs or [one.word for one in found if one.arm in ("evenly", "random layers")]
    what = " at equal cost" if costs else " against even and random placing"
    return worst(words) + what


def _hosts(records: Sequence[Record]) -> Iterator[str]:
    hosts = list(dict.fromkeys(record.host for record in records))
    if not hosts:
        return
    yield from ("", "## By host", "")
    yield "Median gains in the sunk run; from scratch for nets that are wide enough."
    yield from ("", "| host | runs | grafted | remedies | left alone | rate alone | equal steps |")
    yield "|---|---|---|---|---|---|---|"
    for host in hosts:
        own = [record for record in records if record.host == host]
        grafted = sum(bool(record.grafts) for record in own)
        treated = sum(bool(record.remedies) for record in own)
        shown = " | ".join(f"{_median(own, arm):+.1%}" for arm in (LEFT, RATE, RESTART))
        yield f"| {host} | {len(own)} | {grafted} | {treated} | {shown} |"


def _median(records: Sequence[Record], arm: str) -> float:
    losses = [record.sunk or record.scratch for record in records]
    return statistics.median(gain(own["Esper"], own[arm]) for own in losses)


def _worse(records: Sequence[Record]) -> Iterator[str]:
    """What Esper did in the runs that it made worse."""
    found = []
    for record in records:
        losses = record.sunk or record.scratch
        lost = gain(losses["Esper"], losses[LEFT])
        if lost < -SMALLEST:
            found.append((lost, record))
    if not found:
        return
    yield from ("", "## Worse than left alone", "")
    yield f"{len(found)} of {len(records)} runs, by more than {SMALLEST:.1%}."
    yield from ("", "| run | gain | remedies | grafts |", "|---|---|---|---|")
    for lost, record in sorted(found, key=lambda pair: pair[0]):
        grafts = [graft.split(":")[0] for graft in record.grafts]
        done = [", ".join(part.split(", ")[0] for part in record.remedies), ", ".join(grafts)]
        name = f"{record.host}, seed {record.seed}"
        yield f"| {name} | {lost:+.1%} | {done[0] or '-'} | {done[1] or '-'} |"


def _idle(idle: Sequence[Idle], same: Sequence[bool]) -> Iterator[str]:
    if not idle:
        return
    yield from ("", "## Idle", "")
    yield "CPU time of the process in paired blocks of steps, Esper observing over without Esper."
    yield from ("", "| model | step | cost, median | 95 % of the median |", "|---|---|---|---|")
    for one in idle:
        low, middle, high = idle_cost(one)
        yield f"| {one.name} | {one.step_ms:.2f} ms | {middle:+.1%} | {low:+.1%} to {high:+.1%} |"
    yield from (
        "",
        f"Observed runs with the same held-out loss to the bit: {sum(same)} of {len(same)}.",
    )


def idle_cost(one: Idle) -> tuple[float, float, float]:
    """(low, median, high), shares of a step."""
    ratios = np.array(one.ratios) - 1
    drawn = np.random.default_rng(0).integers(0, len(ratios), (2_000, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    return float(low), float(np.median(ratios)), float(high)


def goals(
    records: Sequence[Record], placed: Sequence[Placed], idle: Sequence[Idle]
) -> Iterator[str]:
    sunk = {one.arm: one for one in dict(tables(records, placed))["Sunk run"]}
    yield from ("", "## Goals", "", "| goal | reached | seen |", "|---|---|---|")
    if sunk:
        left, restart = sunk[LEFT], sunk[RESTART]
        met = _yes(left.better >= GOAL_BETTER)
        yield f"| sunk run: better than left alone in 90 % of runs | {met} | {left.better:.0%} |"
        yield (
            f"| sunk run: not worse than the restart at equal steps | {_yes(restart.not_worse)} | "
            f"{restart.gain:+.1%} ({restart.low:+.1%} to {restart.high:+.1%}) |"
        )
        yield f"| and at equal FLOPs | | {sunk[FLOPS].gain:+.1%}, {sunk[FLOPS].word} |"
    for one in idle:
        _, middle, high = idle_cost(one)
        yield f"| idle costs at most 1 %, {one.name} | {_yes(high <= GOAL_IDLE)} | {middle:+.1%} |"


def _yes(reached: bool) -> str:
    return "yes" if reached else "**no**"


def document(
    records: Sequence[Record],
    placed: Sequence[Placed],
    idle: Sequence[Idle],
    same: Sequence[bool],
    about: Sequence[str],
    earlier: str = "",
) -> str:
    """``benefit.md``.

    Args:
        earlier: such a page, whose tables of tracks that were not run again are kept.
    """
    seeds = len({record.seed for record in records if record.narrow})
    head = [HEAD, *about, "", f"{seeds} seeds of each host that is too narrow, at most."]
    body = [*goals(records, placed, idle), *lines(records, placed, idle, same)]
    run = {title for title, found in tables(records, placed) if found}
    run |= {"Idle"} if idle else set()
    return "\n".join([*head, *body, *_kept(earlier, run)]) + "\n"


_PARTS = {
    "Sunk run": "narrow",
    "From scratch, too narrow": "narrow",
    "From scratch, wide enough": "wide",
    "Adapters": "adapters",
    "Idle": "idle",
}
_KEPT = "Not run again with the rest of this page. "


def _kept(earlier: str, run: Collection[str]) -> Iterator[str]:
    """The sections of an earlier page that are not in this one, and of which commit they are."""
    page, *sections = earlier.split("\n## ")
    commits = [line for line in page.splitlines() if line.startswith("Commit ")]
    for section in sections:
        heading, text = section.rstrip().split("\n", 1)
        title = heading.split(":")[0]
        if title not in _PARTS or title in run:
            continue
        yield from ("", f"## {heading}", "")
        if _KEPT not in text:
            of = [line for line in commits if _PARTS[title] in line.split(", seeds")[0]]
            yield from (_KEPT + " ".join(of), "")
        yield text.strip()
