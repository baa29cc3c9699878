"""A time limit of the script that comes while the ranks of a run wait for one another."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from esper.sdk.following import Follower
from esper.sdk.ranks import Order, Ranks


class Others:
    """The other ranks, as this one sees them.

    Attributes:
        told: what this rank has told them, in order; "no" is a vote against an act.
    """

    layout = None
    meets_each_step = True
    lead = False

    def __init__(self, *orders: Order | None) -> None:
        self.orders = [None if order is None else vars_of(order) for order in orders]
        self.told: list[Any] = []

    def take_order(self) -> dict[str, Any] | None:
        return self.orders.pop(0)

    def values(self, value: float) -> tuple[float, ...]:
        self.told.append(value)
        return (value,)

    def mean(self, value: float) -> float:
        self.told.append(value)
        return value

    def vote(self, error: Exception | None) -> None:
        self.told.append("yes" if error is None else "no")


def vars_of(order: Order) -> dict[str, Any]:
    return {name: getattr(order, name) for name in order.__slots__}


def over(*_: Any) -> None:
    raise TimeoutError("the script's time is over")


def late(*_: Any, **__: Any) -> Any:
    signal.raise_signal(signal.SIGUSR1)


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, over)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("number", ["of the weights", "of the held-out data"])
def test_the_others_get_an_answer_before_the_script_is_told(number: str) -> None:
    others: Any = Others()
    ranks = Ranks(others)
    with pytest.raises(TimeoutError, match="time is over"):
        ranks.digests(2, late) if number == "of the weights" else ranks.mean(late)

    assert len(others.told) == 1
    assert math.isnan(others.told[0])


class Surgery:
    """Its layers are asked for when an order comes; what is ordered then is done."""

    def __init__(self, comes: str) -> None:
        self.layer = late if comes == "while it is prepared" else lambda *_: LAYER
        self.apply = late if comes == "while it is done" else lambda *_: None


LAYER: Any = object()


@pytest.mark.parametrize("comes", ["while it is prepared", "while it is done"])
def test_a_rank_follows_all_orders_before_the_script_is_told(comes: str) -> None:
    graft = Order("graft", adaptation="a", layer="0", blueprint="proj_lora_64")
    others: Any = Others(graft, Order("stop", reason="asked to"), None)
    surgery: Any = Surgery(comes)
    follower = Follower(Ranks(others), surgery, evaluations=None)  # type: ignore[arg-type]
    with pytest.raises(TimeoutError, match="time is over"):
        follower.follow()

    assert others.orders == []
    assert follower.stop_reason == "asked to"
    assert others.told == (["no"] if comes == "while it is prepared" else [])
