"""How right the verdicts on grafts are, against twins that were trained without the graft.

    python -m benchmarks.verdicts [--quick] [--seeds 100:140] [--cases FILE] [--json FILE]
                                  [--document docs/verdicts.md]

Each case is judged as a run would: at each look with what is known by then. The judge sees neither
the twin nor the end of the run. A case is clear where the true gain is beyond half a percent of the
held-out loss by more than two standard errors. Limits of the judge were chosen on seeds 0 to 9;
the seeds from 100 on are for reports. ``--cases`` keeps the trainings, so that a run can be
continued, or judged again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.verdict_cases import (
    END_STEPS,
    GRAFT_STEP,
    LOOK_STEPS,
    STEPS_AFTER,
    Case,
    cases_of,
)
from esper import blueprints
from esper.contracts import CostForecast, Reward, SafetyPolicy, Verdict
from esper.policy.calibration import FEWEST_CASES, Calibration, calibration, shrunken_rate
from esper.reward import (
    Look,
    LossWindow,
    compute_reward,
    forecast_loss,
    held_out_level,
    judge,
)

POLICY = SafetyPolicy()
SMALLEST = POLICY.min_gain_ratio
AGES = (50, 150, 300, 600)
NOISE = 1e-6  # an ablation that measures nothing
SEEN = 120  # up to here the judge was tried with one beginning of its test, then with three
ENDS = (150, 300, 600)  # of the forecasts whose coverage is counted


@dataclass(frozen=True, slots=True)
class Judged:
    """A case with its verdict.

    Attributes:
        gain, error: true gain as a share of the twin's held-out loss, and its standard error.
    """

    case: Case
    gain: float
    error: float
    verdict: Verdict
    reward: Reward

    @property
    def truth(self) -> str:
        """helps, harms, neutral; unclear where the noise does not tell."""
        if self.gain - 2 * self.error > SMALLEST:
            return "helps"
        if self.gain + 2 * self.error < -SMALLEST:
            return "harms"
        return "neutral" if abs(self.gain) + 2 * self.error < SMALLEST else "unclear"

    @property
    def clear(self) -> bool:
        return self.truth in ("helps", "harms")

    @property
    def right(self) -> bool:
        return self.verdict.keep == (self.truth == "helps")

    @property
    def beats_rates(self) -> bool:
        """It is better at the end than the best changed learning rate."""
        on = [loss for step, loss, _ in self.case.looks if step > _end(self.case)]
        return float(np.mean(on)) < min(self.case.rates.values())


def _end(case: Case) -> int:
    return case.looks[-1][0] - END_STEPS


def true_gain(case: Case) -> tuple[float, float]:
    """(mean gain over the last steps, its standard error), shares of the twin's loss.

    Neighbouring looks resemble each other: three count as one.
    """
    twin = dict(case.twin)
    ends = [(twin[step], on) for step, on, _ in case.looks if step > _end(case)]
    gains = np.array([(off - on) / max(abs(off), 1e-12) for off, on in ends])
    return float(gains.mean()), float(gains.std() / math.sqrt(len(gains) / 3))


def window(points: Iterable[tuple[int, float]]) -> LossWindow:
    pairs = list(points)
    return LossWindow(
        np.array([step for step, _ in pairs], dtype=np.int64),
        np.array([loss for _, loss in pairs], dtype=np.float64),
    )


def verdict_of(case: Case, looks: Sequence[Look], policy: SafetyPolicy = POLICY) -> Verdict:
    """As a run does: asked at every look, until there is a verdict."""
    before, after = window(case.before), window(case.after)
    kind = blueprints.get_blueprint(case.blueprint).kind
    for age in range(LOOK_STEPS, policy.probation_steps + 1, LOOK_STEPS):
        step = GRAFT_STEP + age
        seen = [look for look in looks if look.step <= step]
        so_far, _ = after.split(step)
        found = judge(
            before, so_far, graft_step=GRAFT_STEP, policy=policy, kind=kind, looks=seen
        ).verdict
        if found is not None:
            return found
    raise AssertionError("there is a verdict at the cap")


def judged(case: Case) -> Judged:
    looks = [Look(step, off - on, off) for step, on, off in case.looks]
    verdict = verdict_of(case, looks)
    recent = [loss for _, loss in case.before[-50:]]
    reward = compute_reward(
        verdict,
        loss_level=float(np.median(recent)),
        held_out_level=held_out_level(looks),
        cost=CostForecast(case.parameters, 0, case.parameters * 16 / 2**20, 0.05),
        model_parameters=case.model_parameters,
        policy=POLICY,
    )
    gain, error = true_gain(case)
    return Judged(case, gain, error, verdict, reward)


def kept_on_noise(cases: Sequence[Case]) -> int:
    """Runs in which the judge would keep an ablation of noise, with the twin's own losses."""
    kept = 0
    for case in _hosts(cases):
        rng = np.random.default_rng(case.seed)
        looks = [Look(step, NOISE * float(rng.standard_normal()), loss) for step, loss in case.twin]
        bare = dataclasses.replace(case, after=case.twin_after)
        kept += verdict_of(bare, looks).keep
    return kept


def coverage(cases: Sequence[Case], ends: int) -> tuple[int, int]:
    """(runs whose loss stayed inside the forecast's interval, runs), of the unchanged runs."""
    held, hosts = 0, _hosts(cases)
    for case in hosts:
        before, after = window(case.before), window(case.twin_after)
        begins = GRAFT_STEP + POLICY.maturity_steps
        chosen = (after.steps > begins) & (after.steps <= GRAFT_STEP + ends)
        forecast = forecast_loss(before.steps, before.loss, after.steps[chosen])
        held += abs(forecast.level - after.loss[chosen].mean()) <= forecast.interval
    return held, len(hosts)


def _hosts(cases: Sequence[Case]) -> list[Case]:
    """One case of each host."""
    return list({case.seed: case for case in cases}.values())


def ablation_at(case: Case, age: int) -> float:
    """Of the last 100 steps until an age, a share of the loss."""
    shares = [
        (off - on) / max(abs(off), 1e-12)
        for step, on, off in case.looks
        if age - 100 < step - GRAFT_STEP <= age
    ]
    return float(np.mean(shares))


def twin_at(case: Case, age: int) -> float:
    twin = dict(case.twin)
    gains = [
        (twin[step] - on) / max(abs(twin[step]), 1e-12)
        for step, on, _ in case.looks
        if age - 100 < step - GRAFT_STEP <= age
    ]
    return float(np.mean(gains))


def auc(results: Sequence[Judged], score: Callable[[Case], float]) -> float:
    """How well a score tells clear help from clear harm and nothing; NaN without both."""
    told = [result for result in results if result.truth != "unclear"]
    truth = [result.truth == "helps" for result in told]
    if len(set(truth)) < 2:
        return math.nan
    return float(roc_auc_score(truth, [score(result.case) for result in told]))


def share(part: int, whole: int) -> str:
    """A share with its 95 % interval (Wilson 1927)."""
    if not whole:
        return "none"
    z, p = 1.96, part / whole
    centre = (p + z * z / (2 * whole)) / (1 + z * z / whole)
    half = z * math.sqrt(p * (1 - p) / whole + z * z / (4 * whole**2)) / (1 + z * z / whole)
    return f"{part} of {whole}, {p:.0%} ({max(0.0, centre - half):.0%} to {centre + half:.0%})"


def table(results: Sequence[Judged]) -> list[tuple[str, str]]:
    """(what, result) in the order of the document."""
    cases = [result.case for result in results]
    clear = [result for result in results if result.clear]
    unseen = [result for result in clear if result.case.seed > SEEN]
    harms = [result for result in results if result.truth == "harms"]
    helps = [result for result in results if result.truth == "helps"]
    neutral = [result for result in results if result.truth == "neutral"]
    kept = [result for result in results if result.verdict.keep]
    early = [r for r in clear if (ablation_at(r.case, 150) > 0) == (r.truth == "helps")]
    rows = [
        ("grafts, hosts", f"{len(results)}, {len(_hosts(cases))}"),
        ("true gain: helps, harms, neutral, unclear", _counts(results)),
        ("right in clear cases", share(sum(r.right for r in clear), len(clear))),
        (
            f"the same for seeds above {SEEN}, which came after the last change of the judge",
            share(sum(r.right for r in unseen), len(unseen)),
        ),
        ("helpful grafts kept", share(sum(r.verdict.keep for r in helps), len(helps))),
        ("harmful grafts kept", share(sum(r.verdict.keep for r in harms), len(harms))),
        ("kept grafts that harm", share(sum(r.truth == "harms" for r in kept), len(kept))),
        ("neutral grafts kept", share(sum(r.verdict.keep for r in neutral), len(neutral))),
        (
            "right in clear cases by the sign of the ablation at step 150",
            share(len(early), len(clear)),
        ),
        ("kept on an ablation of noise 1e-6", share(kept_on_noise(cases), len(_hosts(cases)))),
        (
            "helpful grafts that beat the best change of learning rate",
            share(sum(r.beats_rates for r in helps), len(helps)),
        ),
        ("steps until a graft is kept, median", _median(r.verdict.steps_observed for r in kept)),
        (
            "steps until it is taken out, median",
            _median(r.verdict.steps_observed for r in results if not r.verdict.keep),
        ),
        ("kept grafts whose reward is negative", share(sum(_negative(kept)), len(kept))),
        ("rank correlation of reward and true gain", f"{_rank_correlation(results):+.2f}"),
    ]
    rows += [
        (f"forecast's 95 % interval holds, {ends} steps", share(*coverage(cases, ends)))
        for ends in ENDS
    ]
    for name, at in (("ablation", ablation_at), ("paired twin", twin_at)):
        scores = [auc(results, partial(at, age=age)) for age in AGES]
        text = ", ".join(f"{score:.2f}" for score in scores)
        rows.append((f"AUC of the {name} after {', '.join(map(str, AGES))} steps", text))
    return rows


def predicted(results: Sequence[Judged]) -> Calibration:
    """The chance of a clear gain by blueprint, for each case from all other hosts."""
    told = [result for result in results if result.truth != "unclear"]
    said = []
    for result in told:
        others = [other for other in told if other.case.seed != result.case.seed]
        same = [other for other in others if other.case.blueprint == result.case.blueprint]
        said.append(shrunken_rate([_helped(others), _helped(same)]))
    return calibration(said, [result.truth == "helps" for result in told])


def _helped(results: Sequence[Judged]) -> tuple[int, int]:
    return sum(result.truth == "helps" for result in results), len(results)


def by_blueprint(results: Sequence[Judged]) -> list[str]:
    """How often each blueprint has helped."""
    told = [result for result in results if result.truth != "unclear"]
    rows = []
    for slug in sorted({result.case.blueprint for result in told}):
        helped, cases = _helped([result for result in told if result.case.blueprint == slug])
        few = ", too few to trust" if cases < FEWEST_CASES else ""
        rows.append(f"| {slug} | {share(helped, cases)}{few} |")
    return rows


def _counts(results: Sequence[Judged]) -> str:
    found = Counter(result.truth for result in results)
    return ", ".join(str(found[name]) for name in ("helps", "harms", "neutral", "unclear"))


def _median(values: Iterable[int]) -> str:
    known = list(values)
    return f"{np.median(known):.0f}" if known else "none"


def _negative(kept: Sequence[Judged]) -> list[bool]:
    return [result.reward.total < 0 for result in kept]


def _rank_correlation(results: Sequence[Judged]) -> float:
    """Spearman's; NaN for fewer than three cases."""
    pairs = [(result.reward.total, result.gain) for result in results]
    if len(pairs) < 3:
        return math.nan
    ranks = [np.argsort(np.argsort(v)) for v in zip(*pairs, strict=True)]
    correlation: Any = np.corrcoef(ranks)
    return float(correlation[0, 1])


def misses(results: Sequence[Judged]) -> list[str]:
    """Every clear case that was judged wrongly."""
    return [
        f"| {r.case.seed} | {r.case.kind} | {r.case.layer} | {r.case.blueprint} | {r.gain:+.2%} ± "
        f"{2 * r.error:.2%} | {'kept' if r.verdict.keep else 'taken out'} after "
        f"{r.verdict.steps_observed} | {r.verdict.reason} |"
        for r in results
        if r.clear and not r.right
    ]


def document(results: Sequence[Judged], seeds: str) -> str:
    rows = "\n".join(f"| {what} | {result} |" for what, result in table(results))
    wrong = "\n".join(misses(results)) or "| | | | | | none | |"
    kinds = Counter(result.case.kind for result in results)
    hosts = ", ".join(f"{name} {count}" for name, count in sorted(kinds.items()))
    return f"""# How right the verdicts are

Generated by `python -m benchmarks.verdicts --seeds {seeds} --document docs/verdicts.md`. The limits
of the judge were chosen on seeds 0 to 9, the width of its forecasts later, on 0 to 59 and 300 to
343.

Each host is trained for {GRAFT_STEP:,} steps, and from there for {STEPS_AFTER:,} more: unchanged
(the twin), with changed learning rates, and once for each graft, on the same batches. The true gain
is the difference of the held-out losses over the last {END_STEPS} steps, as a share. A case is
clear where it is beyond ± {SMALLEST:.1%} by more than two standard errors. Small models on a CPU;
grafts by host: {hosts}.

| | |
|---|---|
{rows}

Shares have their 95 % interval in brackets. Grafts of one host share its data, so the intervals are
somewhat too narrow.

## Clear cases that were judged wrongly

| seed | host | layer | blueprint | true gain | verdict | reason |
|---|---|---|---|---|---|---|
{wrong}

## How often a blueprint helps

| blueprint | helped by more than {SMALLEST:.1%} |
|---|---|
{chr(10).join(by_blueprint(results))}

The chance of a gain, predicted for each graft from the other hosts (all, and those of its
blueprint, with shrinkage): {predicted(results)}.
Decisions use [more cases and more features](confidence.md).

## What the judge cannot see

- A host comes to depend on its graft, so the ablation overrates a graft in the long run. One that
  helps for 200 steps and makes the host overfit later is kept.
- A held-out loss is a sample. Its own error is in no interval: the interval is about the run.
- With fewer than four looks no gain can be shown, and the graft goes.
"""


# --- running --------------------------------------------------------------------------------------


def load(path: Path) -> list[Case]:
    if not path.exists():
        return []
    return [_case(json.loads(line)) for line in path.read_text().splitlines() if line]


def _case(data: dict[str, Any]) -> Case:
    pairs = ("before", "held_before", "after", "looks", "twin", "twin_after")
    values: dict[str, Any] = data | {name: [tuple(v) for v in data[name]] for name in pairs}
    return Case(**values)


def collect(seeds: Sequence[int], grafts: int, path: Path | None) -> list[Case]:
    cases = load(path) if path is not None else []
    done = {case.seed for case in cases}
    for seed in seeds:
        if seed in done:
            continue
        found = cases_of(seed, grafts)
        cases += found
        print(f"seed {seed}: {len(found)} grafts", flush=True)
        if path is not None:
            with path.open("a") as file:
                file.writelines(json.dumps(asdict(case)) + "\n" for case in found)
    return [case for case in cases if case.seed in seeds]


def seeds_of(text: str) -> list[int]:
    """``100:103,107`` is 100, 101, 102 and 107."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition(":")
        seeds += range(int(first), int(last) if last else int(first) + 1)
    return seeds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the first 4 hosts with 3 grafts each")
    parser.add_argument("--seeds", default="100:140", help="such as 100:134,135")
    parser.add_argument("--cases", type=Path, help="file of the trainings, one JSON object a line")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--document", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds = seeds_of(given.seeds)
    seeds = seeds[:4] if given.quick else seeds
    results = [judged(case) for case in collect(seeds, 3 if given.quick else 5, given.cases)]
    for what, result in table(results):
        print(f"{what:64} {result}")
    if given.json:
        given.json.write_text(json.dumps(dict(table(results)), indent=2) + "\n")
    if given.document:
        given.document.write_text(document(results, given.seeds))


if __name__ == "__main__":
    main()
