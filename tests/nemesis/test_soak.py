"""Growth is measured after the warm-up, and a process that was started again begins anew."""

from __future__ import annotations

from tests.nemesis.soak import Samples, describe_growth


def test_growth_is_that_from_the_second_quarter_to_the_last() -> None:
    samples = Samples()
    samples.readings["web, MiB"] = [50, 90, 100, 100, 105, 105, 110, 110]
    samples.readings["a process that lived too briefly, MiB"] = [1, 2, 3]
    assert samples.growth() == {"web, MiB": (100, 110)}
    assert "| web, MiB | 100 | 110 | +10.0 % |" in describe_growth(samples, 60)
