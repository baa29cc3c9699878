"""On several ranks only the one that decides writes on the console."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import pytest

from tests.esper.distributed.rank_pool import RankPool
from tests.esper.distributed.tiny_replica import replica

pytestmark = pytest.mark.process


def _what_is_said(rank: int) -> tuple[str, str]:
    terminal = io.StringIO()
    with redirect_stderr(terminal), replica(rank, mode="supervised") as side:
        side.run(2)
        receipt = side.session.graft("inner", "proj_lora_64")
        side.run(1)
        side.session.undo(receipt)
        side.session.set_lr("inner", 0.5)
        reasons = str(side.session.why())
    return terminal.getvalue(), reasons


def test_only_the_rank_that_decides_writes(two_ranks: RankPool) -> None:
    (first, reasons), (second, elsewhere) = two_ranks.run(_what_is_said)
    lines = first.splitlines()
    for words in (
        "attached",
        "grafted proj_lora_64",
        "took proj_lora_64",
        "halve the learning rate",
    ):
        assert sum(words in line for line in lines) == 1, first
    assert second == ""
    assert "samples of the loss" in reasons
    assert "Rank 0 decides" in elsewhere
