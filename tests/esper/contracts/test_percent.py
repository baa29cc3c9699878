"""Shares are written with as many decimals as their size needs."""

from __future__ import annotations

import pytest

from esper.contracts.percent import percent, signed


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.8702, "87%"),
        (0.0123, "1.2%"),
        (0.005, "0.5%"),
        (0.00034, "0.034%"),
        (0.0, "0%"),
        (0.997, "99.7%"),
        (1.0, "100%"),
        (-0.0871, "-8.7%"),
        (float("nan"), "nan%"),
    ],
)
def test_a_share_has_at_most_two_digits_but_is_never_rounded_to_all(
    share: float, text: str
) -> None:
    assert percent(share) == text


def test_a_gain_has_its_sign() -> None:
    assert [signed(share) for share in (0.87, -0.01, 0.0)] == ["+87%", "-1%", "0%"]
