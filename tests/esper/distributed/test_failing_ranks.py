"""One rank fails, at any point of a graft or an undo: all ranks are as before, and train on."""

from __future__ import annotations

import os
import sys
import time
from types import FrameType
from typing import Any

import pytest

from esper.exceptions import ReplicaError
from tests.esper.distributed.rank_pool import GROUP_TIMEOUT_S, RankPool
from tests.esper.distributed.tiny_replica import Replica, graft, replica
from tests.esper.tiny_models import holds_nothing

pytestmark = pytest.mark.process

SURGERY_FILES = (
    "/grafting/changes/apply.py",
    "/grafting/slot.py",
    "/grafting/trained_tensors/ledger.py",
    "/grafting/ranks/replicas.py",
    "/grafting/changes/certify.py",
)
# The way back, and the communication between ranks: a failure there is one of the network, which
# torch reports.
NOT_HERE = {
    "_withdraw",
    "_take_out",
    "take_out",
    "remove_slots",
    "remove",
    "grafts",
    "slots",
    "vote",
    "_vote",
    "_gather",
    "_gather_texts",
    "_broadcast",
    "fail",
    "meet",
    "jointly",
    "pack",
    "unpack",
    "_key_of",
    "__init__",
    "<genexpr>",
    "<listcomp>",
    "<setcomp>",
    "_reason",
    "put_back",
    "rebuild_reducer",  # also part of the way back; see its own test
    "_use_reduction",
    "reduction",
    "_register",
}


class Boom(BaseException):  # not an Exception: nothing on the way may swallow it
    """Thrown by the test at one line."""


def raise_at_line(number: int, reached: list[str]) -> Any:
    seen, applying = 0, False

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal seen, applying
        code = frame.f_code
        if code.co_name == "_apply" and code.co_filename.endswith("/grafting/changes/apply.py"):
            applying = event != "return"
        if not applying:
            return None  # before it, all ranks meet; after it, all have the graft
        if not code.co_filename.endswith(SURGERY_FILES) or code.co_name in NOT_HERE:
            return None
        if code.co_name == "share" and "self" in frame.f_locals:
            return None  # rank 0's tensors are on their way
        if getattr(frame.f_locals.get("joint"), "done", False):
            return trace  # all ranks have it by now; only the receipt is left to be handed over
        if event == "line":
            seen += 1
            if seen == number:
                sys.settrace(None)
                reached.append(f"{os.path.basename(code.co_filename)}:{frame.f_lineno}")
                raise Boom
        return trace

    return trace


def _fail_while_grafting(rank: int, failing: int, stride: int) -> list[str]:
    """Grafts again and again; each time the failing rank raises some lines later."""
    reached: list[str] = []
    with replica(rank, dropout=0.2) as side:
        side.run(3)
        before = side.state()
        for line in range(1, 5000, stride):
            if rank == failing:
                sys.settrace(raise_at_line(line, reached))
            try:
                receipt = graft(side)
            except (Boom, ReplicaError) as error:
                failed = isinstance(error, Boom)
            else:
                break
            finally:
                sys.settrace(None)
            assert failed == (rank == failing), line
            assert side.state() == before, (line, reached[-1:])
            assert holds_nothing(side.bare.inner)
            assert not side.bare.inner._forward_hooks, line
        assert receipt.present, "some time no line is left to fail at"
        side.run(3)
        return [*reached, side.parameters()]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_at_any_line_of_a_graft_takes_all_ranks_back(
    two_ranks: RankPool, failing: int
) -> None:
    answers = two_ranks.run(_fail_while_grafting, failing, 7)
    *reached, parameters = answers[failing]
    assert answers[1 - failing] == [parameters]
    assert len(reached) > 30, "the injection reached no depth"
    assert {place.split(":")[0] for place in reached} >= {"apply.py", "slot.py", "certify.py"}


def _fail_in_the_reducer(rank: int, failing: int, undo: bool) -> str:
    with replica(rank, dropout=0.2) as side:
        side.run(3)
        receipt = graft(side, "outer", "mlp_gelu_2048") if undo else None
        side.run(2)
        before = side.state()
        if rank == failing:
            break_once(side)
        with pytest.raises(Boom if rank == failing else ReplicaError) as failed:
            graft(side) if receipt is None else side.session.undo(receipt, hard=False)
        assert side.state() == before
        side.run(3)
        if receipt is not None:
            assert receipt.present
            side.session.undo(receipt)
        else:
            graft(side, "inner")
        side.run(3)
        return side.parameters() + ("" if rank == failing else str(failed.value))


def break_once(side: Replica) -> None:
    """The next reducer of this rank is not built."""
    model: Any = side.model
    build = model._ddp_init_helper

    def fail(*_: Any) -> None:
        model._ddp_init_helper = build
        raise Boom("no memory for buckets")

    model._ddp_init_helper = fail


@pytest.mark.parametrize("undo", [False, True], ids=["graft", "undo"])
@pytest.mark.parametrize("failing", [0, 2])
def test_a_reducer_that_cannot_be_built_on_one_rank_stops_all(
    three_ranks: RankPool, failing: int, undo: bool
) -> None:
    answers = three_ranks.run(_fail_in_the_reducer, failing, undo)
    assert len({answer[:64] for answer in answers}) == 1
    assert f"rank {failing}: Boom: no memory for buckets" in answers[1]


def _drift(rank: int) -> str:
    with replica(rank) as side:
        side.run(3)
        if rank:
            side.bare.outer.bias.data[0] += 1e-6  # what DDP can never see
        before = side.state()
        with pytest.raises(ReplicaError) as refused:
            graft(side)
        assert side.state() == before
        return str(refused.value)


def test_replicas_that_have_drifted_apart_are_not_grafted(two_ranks: RankPool) -> None:
    for sentence in two_ranks.run(_drift):
        assert "checksums differ" in sentence


def _die(rank: int, where: str) -> tuple[str, float]:
    with replica(rank) as side:
        side.run(3)
        if rank == 1 and where == "between steps":
            os._exit(3)
        if rank == 1:
            break_for_good(side)
        started = time.monotonic()
        with pytest.raises(RuntimeError) as failed:
            graft(side) if where == "in a graft" else side.session.step(1.0)
        assert holds_nothing(side.bare.inner)
        return str(failed.value), time.monotonic() - started


def break_for_good(side: Replica) -> None:
    model: Any = side.model
    model._ddp_init_helper = lambda *_: os._exit(3)


@pytest.mark.parametrize("where", ["between steps", "in a graft"])
def test_when_a_rank_dies_torch_tells_the_others_in_time(where: str) -> None:
    pool = RankPool(2)
    try:
        alive, dead = pool.run(_die, where)
    finally:
        pool.close()
    assert dead is None
    assert alive[0]
    assert alive[1] < GROUP_TIMEOUT_S + 60
