"""A run on several ranks: one of them decides, saves and talks to the server."""

from __future__ import annotations

import io
import os
import tempfile
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import esper
from esper.compilation import build_kernel
from esper.contracts import AdaptationState, CommandKind, SafetyPolicy
from esper.exceptions import GraftError, IncompatibleLayerError, ReplicaError
from esper.sdk import RunStopped, attaching
from esper.sdk.transport.queues import Pace
from tests.esper.distributed.rank_pool import RankPool
from tests.esper.distributed.tiny_replica import Replica, TinyNet, batch, graft, replica
from tests.esper.sdk.transport.control_plane import ControlPlane

pytestmark = pytest.mark.process


def agree(rank: int, done: bool) -> bool:
    """The value of rank 0, so that both ranks leave a loop at the same step."""
    shared = torch.tensor([done])
    dist.broadcast(shared, 0)
    return bool(shared)


def _follow_the_server(rank: int) -> dict[str, Any]:
    os.environ["ESPER_STATE_DIR"] = tempfile.mkdtemp()
    attaching.Pace = partial(Pace, flush=0.02, first_retry=0.02)  # type: ignore[misc,assignment]
    plane = ControlPlane().start() if rank == 0 else None
    address = plane.url if plane else "http://nobody"
    with replica(rank, mode="automatic", server=address, token="esp_attach") as side:
        try:
            return _carry_out_commands(side, plane)
        finally:
            attaching.Pace = Pace  # type: ignore[misc]
            if plane is not None:
                plane.stop()


def _carry_out_commands(side: Replica, plane: ControlPlane | None) -> dict[str, Any]:
    rank, seen = side.rank, {}
    side.run(1)
    run_until(side, lambda: bool(plane and plane.listeners))
    if plane is not None:
        layer = next(layer for layer in side.session.layers if layer.name == "inner")
        bundle = build_kernel(layer, "proj_lora_64", private_key=plane.kernel_key)
        kernel = plane.add_kernel(bundle)
        plane.send(
            plane.command(
                CommandKind.GRAFT, 1, adaptation="a1", layer="inner", kernel_digest=kernel
            )
        )
    run_until(side, lambda: bool(plane and answered(plane, 1)))
    seen["grafted"] = [(entry.uid, entry.layer, entry.step) for entry in side.session.adaptations]
    if plane is not None:
        plane.send(plane.command(CommandKind.UNDO, 2, adaptation="a1", payload={"hard": True}))
    run_until(side, lambda: bool(plane and answered(plane, 2)))
    seen["undone"] = [str(entry.state) for entry in side.session.adaptations]
    if plane is not None:
        reason = {"reason": "enough"}
        plane.send(plane.command(CommandKind.STOP_RUN, 3, payload=reason))
    with pytest.raises(RunStopped, match="enough"):
        run_until(side, lambda: False)
    seen["steps"], seen["sha"] = side.at, side.parameters()
    side.session.close()  # the last answer is on its way until then
    if rank == 0 and plane is not None:
        seen["acks"] = [answered(plane, seq) for seq in (1, 2, 3)]
        seen["registrations"] = len(plane.registrations)
    return seen


def _take_remedies(rank: int) -> dict[str, Any]:
    os.environ["ESPER_STATE_DIR"] = tempfile.mkdtemp()
    attaching.Pace = partial(Pace, flush=0.02, first_retry=0.02)  # type: ignore[misc,assignment]
    plane = ControlPlane().start() if rank == 0 else None
    address = plane.url if plane else "http://nobody"

    def checkpoint() -> None:
        if rank == 1:
            raise OSError("disk full")

    options = {"evaluate": lambda: float(rank), "checkpoint": checkpoint}
    with replica(rank, mode="supervised", server=address, token="esp_attach", **options) as side:
        try:
            return _remedies_in_turn(side, plane)
        finally:
            attaching.Pace = Pace  # type: ignore[misc]
            if plane is not None:
                plane.stop()


def _remedies_in_turn(side: Replica, plane: ControlPlane | None) -> dict[str, Any]:
    session, seen = side.session, {}
    side.run(40)  # a good state is kept
    run_until(side, lambda: bool(plane and plane.listeners))

    def order(seq: int, kind: CommandKind, adaptation: str, **payload: Any) -> None:
        if plane is not None:
            plane.send(plane.command(kind, seq, adaptation=adaptation, payload=payload))
        run_until(side, lambda: bool(plane and answered(plane, seq)))

    before = side.parameters()
    order(1, CommandKind.REMEDY, "a1", remedy="rewind", config={"factor": 0.5})
    seen["in effect"] = [(r.remedy, r.step, r.details, r.adaptation) for r in session.remedies]
    seen["rewound"] = side.parameters()
    assert seen["rewound"] != before
    order(2, CommandKind.UNDO, "a1", hard=False)
    assert session.remedies == ()
    order(3, CommandKind.REMEDY, "a3", remedy="evaluate_now")
    order(4, CommandKind.REMEDY, "a4", remedy="checkpoint_now")
    order(5, CommandKind.REMEDY, "a5", remedy="repair_scale")
    order(6, CommandKind.REMEDY, "a6", remedy="hold_lr", config={"value": 0.01})
    order(7, CommandKind.UNDO, "a6", hard=True)
    assert session.remedies == ()
    states = session._parts.surgery.states
    seen["good"] = states.steps if states is not None else None
    seen["steps"], seen["sha"] = side.at, side.parameters()
    if plane is not None:
        run_until_here = [answered(plane, seq) for seq in range(1, 8)]
        seen["acks"] = run_until_here
        seen["measured"] = plane.acks_of(3)[-1]["details"]
        seen["reasons"] = [plane.acks_of(seq)[-1]["reason"] for seq in (4, 5)]
        seen["exact"] = plane.acks_of(7)[-1]["details"]
    return seen


def test_a_remedy_of_the_server_is_applied_on_all_ranks_or_on_none(two_ranks: RankPool) -> None:
    lead, other = two_ranks.run(_take_remedies)
    assert lead["acks"] == [
        *(["applied"], ["applied"], ["applied"], ["refused"], ["refused"]),
        *(["applied"], ["applied"]),
    ]
    assert lead["in effect"] == other["in effect"] != []
    assert lead["rewound"] == other["rewound"]
    assert lead["measured"] == {"held_out_loss": 0.5}  # the mean of both ranks
    assert "disk full" in lead["reasons"][0]
    assert "needs a batch of inputs" in lead["reasons"][1]
    assert lead["exact"] == {"exact": True}
    for shared in ("steps", "sha", "good"):
        assert lead[shared] == other[shared]


def run_until(side: Replica, done: Any, seconds: float = 500.0) -> None:
    ends = time.monotonic() + seconds
    while not agree(side.rank, done() or time.monotonic() > ends):
        side.step()
        time.sleep(0.01)
    assert time.monotonic() < ends


def answered(plane: ControlPlane, seq: int) -> list[str]:
    return [ack["state"] for ack in plane.acks_of(seq) if ack["state"] != "accepted"]


def test_a_command_to_rank_0_is_carried_out_on_all_ranks_in_one_step(two_ranks: RankPool) -> None:
    lead, other = two_ranks.run(_follow_the_server)
    assert lead["acks"] == [["applied"]] * 3
    assert lead["registrations"] == 1, "only rank 0 talks to the server"
    assert lead["grafted"] == other["grafted"] != []
    assert lead["undone"] == other["undone"] == ["rolled_back"]
    assert lead["steps"] == other["steps"]
    assert lead["sha"] == other["sha"]


def _evaluate(rank: int, failing: int) -> list[Any]:
    calls = []

    def evaluate() -> float:
        calls.append(1)
        if rank == failing:
            raise OSError("no held-out data")
        return float(rank + len(calls))

    policy = SafetyPolicy(maturity_steps=5, probation_steps=9_000, probation_looks=89)
    with replica(rank, evaluate=evaluate, safety_policy=policy) as side:
        side.run(2)
        graft(side)
        side.run(110)
        return [len(calls), side.session.adaptations[0].ablation_gain, side.parameters()]


def test_all_ranks_evaluate_in_the_same_step_and_their_mean_counts(two_ranks: RankPool) -> None:
    lead, other = two_ranks.run(_evaluate, -1)
    assert lead[0] == other[0] >= 3  # with and without the graft, and the held-out loss
    assert lead[1] == other[1] == 1.0
    assert lead[2] == other[2]


def test_an_evaluation_that_fails_on_one_rank_is_unknown_and_blocks_nobody(
    two_ranks: RankPool,
) -> None:
    lead, other = two_ranks.run(_evaluate, 1)
    assert lead[1] != lead[1]
    assert lead[2] == other[2]


def _judge(rank: int) -> list[Any]:
    policy = SafetyPolicy(maturity_steps=10, probation_steps=30)
    with replica(rank, mode="automatic", safety_policy=policy) as side:
        side.run(3)
        receipt = graft(side)
        side.run(150)
        (entry,) = side.session.adaptations[:1]
        return [str(entry.state), receipt.present, side.parameters()]


def test_rank_0s_verdict_is_carried_out_on_all(two_ranks: RankPool) -> None:
    lead, other = two_ranks.run(_judge)
    assert lead == other
    assert lead[:2] == [str(AdaptationState.ROLLED_BACK), False]


def _resume(rank: int) -> None:
    with replica(rank, norm=False) as side:
        side.run(3)
        graft(side)
        graft(side, "", "ring_allreduce")
        side.run(5)
        saved = io.BytesIO()
        state = [side.session.state_dict(), side.bare.state_dict(), side.optimizer.state_dict()]
        torch.save([*state, side.scheduler.state_dict()], saved)
        wanted = side.run(10), side.parameters()
    with replica(rank, norm=False) as later:
        session, model, optimizer, scheduler = torch.load(
            io.BytesIO(saved.getvalue()), weights_only=True
        )
        later.session.load_state_dict(session)
        later.bare.load_state_dict(model)
        later.optimizer.load_state_dict(optimizer)
        later.scheduler.load_state_dict(scheduler)
        later.at = 8
        assert (later.run(10), later.parameters()) == wanted
        hook = later.model._get_ddp_logging_data().get("comm_hook")  # type: ignore[operator]
        assert hook == "sum_in_background"


def test_a_checkpoint_goes_on_equal_to_the_bit_on_all_ranks(two_ranks: RankPool) -> None:
    two_ranks.run(_resume)


def _graft_what_takes_none(rank: int) -> list[str]:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when it is imported

    static = DistributedDataParallel(TinyNet(norm=False), static_graph=True)
    wrapped = DistributedDataParallel(TinyNet(norm=False))
    zero = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.Adam, lr=0.1)
    cases = [(static, torch.optim.SGD(static.parameters(), lr=0.1)), (wrapped, zero)]
    said = []
    for model, optimizer in cases:
        with esper.attach(model, optimizer) as session:
            for at in range(12):
                x, y = batch(rank, at)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                session.step(1.0)
            assert (session.frame() is not None) == (rank == 0)
            for act in (session.graft, session.set_lr):
                with pytest.raises((IncompatibleLayerError, GraftError)) as refused:
                    act("inner", "proj_lora_64" if act == session.graft else 0.5)  # type: ignore[operator]
                said.append(str(refused.value))
    return said


def test_what_takes_no_graft_is_observed_and_refused_at_the_graft(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(_graft_what_takes_none)
    assert first == second
    for sentence, way in zip(first, 2 * ["leave static_graph"] + 2 * ["its inner"], strict=True):
        assert way in sentence


def _skip_first_batches(rank: int, skipping: tuple[int, ...]) -> Any:
    """A script that skips a bad batch counts the step all the same."""
    with replica(rank, mode="supervised") as side:
        for _ in range(2):
            if rank not in skipping:
                side.bare(side.batch()[0])
            side.session.step()
        side.run(20)
        known = [(layer.name, bool(layer.in_shape)) for layer in side.session.layers if layer.name]
        side.session.graft("inner", "proj_lora_64")
        side.run(2)
        return known, side.session.frame() is not None, side.parameters()


@pytest.mark.parametrize("skipping", [(0,), (1,), (0, 1)])
def test_layers_are_known_on_all_ranks_where_one_skips_its_first_batches(
    two_ranks: RankPool, skipping: tuple[int, ...]
) -> None:
    first, second = two_ranks.run(_skip_first_batches, skipping)

    assert first[0] == second[0] == [("inner", True), ("norm", True), ("outer", True)]
    assert first[1]
    assert first[2] == second[2]


def _keep_an_average(rank: int, keepers: tuple[int, ...]) -> str:
    with replica(rank, norm=None) as side:
        average = [p.detach().clone() for p in side.bare.parameters()]
        if rank not in keepers:
            average.clear()
        for _ in range(3):
            side.step()
            for kept, parameter in zip(average, side.bare.parameters(), strict=False):
                kept.lerp_(parameter.detach(), 0.1)
        with pytest.raises((IncompatibleLayerError, ReplicaError)) as refused:
            graft(side)
        side.run(2)
        return f"{refused.value} {average and side.parameters()}"


@pytest.mark.parametrize("keepers", [(0, 1), (0,), (1,)])
def test_no_rank_grafts_where_one_keeps_an_average_by_hand(
    two_ranks: RankPool, keepers: tuple[int, ...]
) -> None:
    for answer in two_ranks.run(_keep_an_average, keepers):
        assert "keeps an average by hand" in answer


def _keep_anchors(rank: int) -> list[str]:
    with replica(rank, norm=None, mode="automatic") as side:
        anchors = {name: p.detach().clone() for name, p in side.bare.named_parameters()}
        side.run(3)
        surgery = side.session._parts.surgery
        operation = surgery.planned("inner", "proj_lora_64", "", {})
        with pytest.raises((IncompatibleLayerError, ReplicaError)) as refused:
            surgery.apply(operation)
        graft(side)  # the script knows what it does
        side.run(2)
        assert anchors
        return [str(refused.value), side.parameters()]


def test_the_policy_grafts_on_no_rank_beside_anchors(two_ranks: RankPool) -> None:
    (first, weights), (second, others) = two_ranks.run(_keep_anchors)
    assert "by the names of" in first
    assert "by the names of" in second
    assert weights == others


def _attach_again(rank: int) -> int:
    with replica(rank) as side:
        side.run(1)
    groups = len(dist.distributed_c10d._world.pg_map)
    for _ in range(2):
        with replica(rank) as side:
            side.run(1)
    return len(dist.distributed_c10d._world.pg_map) - groups


def test_a_later_session_of_the_same_ranks_makes_no_group_of_its_own(two_ranks: RankPool) -> None:
    assert two_ranks.run(_attach_again) == [0, 0]
