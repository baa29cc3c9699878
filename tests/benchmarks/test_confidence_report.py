"""What is held out when the confidence is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from benchmarks import confidence, confidence_fit
from benchmarks.rescue.faults import at8
from esper.policy.cases import Case
from esper.policy.confidence import ConfidenceModel, shipped_models


def case(seed: int, host: str) -> Case:
    return Case(
        seed=seed, host=host, kind="remedy", choice="rewind", layer="run", finding="loss_spike",
        gain=math.nan, error=math.nan, success=seed % 3 > 0,
    )  # fmt: skip


CASES = [case(seed, host) for seed in range(1000, 1012) for host in ("dying ReLU", "abnormal data")]


@pytest.mark.parametrize(
    ("name", "by"), [(one, by) for groups in confidence.GROUPS.values() for _, one, by in groups]
)
def test_no_case_of_the_group_that_is_judged_is_known(
    name: str, by: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(by)
    known: list[set[str]] = []

    def fit(cases: Sequence[Case]) -> ConfidenceModel:
        known.append({by(one) for one in cases})
        return shipped_models()["remedy"]

    monkeypatch.setattr(confidence_fit, "fit", fit)
    found = confidence_fit.cross_validated(CASES, by=by, folds=0)
    every = {by(one) for one in CASES}
    assert len(every) > 1, name
    assert sorted(map(len, known)) == [len(every) - 1] * len(every)
    assert set.union(*known) == every
    assert not any(math.isnan(value) for value in found.said)


@pytest.mark.parametrize("kind", [kind for kind, about in at8.AT_8.items() if not about.bug])
def test_the_data_set_of_a_case_is_the_one_that_its_training_had(kind: str) -> None:
    for seed in range(1000, 1010):
        (drawn,) = at8.cases(kind, range(seed, seed + 1), 10)
        assert confidence.data_set(case(seed, kind)) == drawn.name
