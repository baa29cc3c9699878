"""Every behaviour of a small model of one adaptation: people, server, network, trainer, crashes.

The network may lose, delay and repeat every message. The server moves along the real lifecycle, and
the trainer checks commands with its real code. What is searched is the whole state space.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import pytest

from apps.adaptations.lifecycle import LEAVES_A_REST, NEXT
from esper.contracts import ADAPTATION_ENDED, AdaptationState, Command, CommandKind, signing
from esper.exceptions import CommandRefusedError
from esper.sdk.transport.commands import Trust, verify_command

S = AdaptationState
KEY = signing.generate_private_key()
CRASHES, MOST_COMMANDS = 2, 3
WITH_TRAINER = (S.DISPATCHED, S.ACCEPTED, S.PROBATION, S.ROLLING_BACK)
PASSED = {S.DISPATCHED: (S.APPROVED, S.COMPILE_QUEUED, S.COMPILING, S.COMPILED)}
STAYS = (S.KEPT, S.ROLLBACK_FAILED)
UNDO_COUNTS = (S.IN_DOUBT, S.PROBATION, S.KEPT, S.ROLLBACK_FAILED)
LATE, IN_TIME = 2000.0, 500.0
TWICE, UNAPPROVED = "the graft is applied twice", "a graft without an approval"
REFUSED = "sent to the trainer although a person has refused it"
CALLED_FAILED = "an undo is called failed, and no trainer has said so"


@dataclass(frozen=True)
class Rules:
    """The real rules; each mutant breaks one."""

    compare_and_set: bool = True
    fence: bool = True  # the trainer checks the epoch of a command
    sequence: bool = True  # and that its number is new
    expiry: bool = True  # and its time
    deadline_refuses: bool = True  # a deadline never approves
    leftovers_are_undone: bool = True
    late_undo_counts: bool = True  # whatever was thought before its answer came
    silence_is_doubt: bool = True  # an undo without an answer at its deadline has not failed
    failed_rest_counts: bool = True  # what came back with a checkpoint cannot be taken out
    doubt_is_settled: bool = True  # the trainer is asked what its model holds
    missing_is_settled: bool = True  # a new start that does not hold it ends also what has failed


class World(NamedTuple):
    """One moment. Messages stay in the network for ever: each may arrive at any time, or never.

    A tuple, which is compared and hashed several times as fast as a dataclass.
    """

    state: AdaptationState = S.AWAITING_APPROVAL
    read: tuple[AdaptationState, ...] = ()  # what two operators have on their screens
    approved: bool = False
    epoch: int = 1
    seq: int = 0
    sent: frozenset[tuple[str, int, int]] = frozenset()  # kind, epoch, seq
    acks: frozenset[tuple[str, int, int]] = frozenset()  # the same of the command
    heard: frozenset[tuple[str, int, int]] = frozenset()  # a repeated answer changes nothing
    grafted: bool = False  # the server was told once that the graft is in the model
    late: bool = False  # the graft command has expired
    life: int = 1  # the epoch that the trainer has registered with
    taken: int = 0  # the last command in its journal
    held: int = 0  # how often the graft is in the model
    saved: int = 0  # and in its checkpoint
    crashes: int = 0
    refused: bool = False  # a person has said no


def move(world: World, to: AdaptationState, **changes: object) -> World:
    """The server's transition; along the real lifecycle only."""
    path = (world.state, *PASSED.get(to, ()), to) if world.state == S.AWAITING_APPROVAL else None
    for before, after in zip(path or (world.state,), (path or (world.state, to))[1:], strict=False):
        assert after in NEXT[before], (before, after)
    return world._replace(state=to, **changes)


def send(world: World, kind: str) -> World:
    seq = world.seq + 1
    return world._replace(seq=seq, sent=world.sent | {(kind, world.epoch, seq)})


@cache
def signed(epoch: int, seq: int) -> tuple[Command, str]:
    command = Command(
        run="run", epoch=epoch, seq=seq, kind=CommandKind.GRAFT, issued_at=0.0, expires_at=1000.0
    )
    return command, signing.sign(command.signing_bytes(), KEY)


@cache
def accepts(epoch: int, seq: int, life: int, taken: int, late: bool, rules: Rules) -> bool:
    """The trainer's real check of a command."""
    trust = Trust("run", life if rules.fence else epoch, signing.public_key(KEY), "")
    now = LATE if late and rules.expiry else IN_TIME
    try:
        verify_command(*signed(epoch, seq), trust, last_seq=taken if rules.sequence else 0, now=now)
    except CommandRefusedError:
        return False
    return True


def people(world: World, rules: Rules) -> Iterator[World]:
    """Two operators look, and later decide on what they have seen."""
    if len(world.read) < 2:
        yield world._replace(read=(*world.read, world.state))
    for seen in set(world.read):
        if seen != S.AWAITING_APPROVAL or (rules.compare_and_set and world.state != seen):
            continue
        if world.state == S.AWAITING_APPROVAL:
            yield send(move(world, S.DISPATCHED, approved=True), "graft")
            yield move(world, S.REJECTED, refused=True)
        else:  # only without compare and set: the later writer overwrites the former
            yield world._replace(state=S.REJECTED, refused=True)


def time_passes(world: World, rules: Rules) -> Iterator[World]:
    if world.state == S.AWAITING_APPROVAL:
        if rules.deadline_refuses:
            yield move(world, S.EXPIRED)
        else:
            yield send(move(world, S.DISPATCHED), "graft")
    if world.state == S.DISPATCHED:
        yield world._replace(late=True)
        yield doubt(world, rules, late=True)
    if world.state == S.PROBATION:
        yield move(world, S.KEPT)
        yield send(move(world, S.ROLLING_BACK), "undo")
        yield doubt(world, rules)
    if world.state == S.ROLLING_BACK and len(world.sent) < MOST_COMMANDS:
        yield doubt(world, rules) if rules.silence_is_doubt else move(world, S.ROLLBACK_FAILED)


def doubt(world: World, rules: Rules, **changes: object) -> World:
    """A deadline has passed without an answer: the trainer is asked."""
    doubtful = move(world, S.IN_DOUBT, **changes)
    return send(doubtful, "ask") if rules.doubt_is_settled else doubtful


def trainer(world: World, rules: Rules) -> Iterator[World]:
    """It takes a command from the network, saves a checkpoint, or is started again."""
    for kind, epoch, seq in world.sent:
        late = world.late and kind == "graft"
        if not accepts(epoch, seq, world.life, world.taken, late, rules):
            continue
        taken = world._replace(taken=max(seq, world.taken))
        if kind == "graft":
            yield answered(taken, kind, seq, held=min(world.held + 1, 2))
        elif kind == "ask":
            yield answered(taken, "holds" if world.held else "lacks", seq)
        else:
            yield answered(taken, kind, seq, held=0)
            if world.held and not any(kind == "failed" for kind, _, _ in world.acks):
                yield answered(taken, "failed", seq)
    if world.saved != world.held:
        yield world._replace(saved=world.held)
    if world.crashes < CRASHES:
        yield registered(world, rules)


def answered(world: World, answer: str, seq: int, **changes: object) -> World:
    return world._replace(acks=world.acks | {(answer, world.life, seq)}, **changes)


def registered(world: World, rules: Rules) -> World:
    """A new life from the checkpoint: what was with the former one is in doubt, then settled."""
    if world.state in WITH_TRAINER:
        world = move(world, S.IN_DOUBT)
    again = world._replace(
        epoch=world.epoch + 1,
        life=world.epoch + 1,
        held=world.saved,
        crashes=world.crashes + 1,
    )
    return says_hello(again, rules)


def says_hello(world: World, rules: Rules) -> World:
    if world.state == S.IN_DOUBT and world.held:
        undo_was_sent = any(kind == "undo" for kind, _, _ in world.sent)
        return (
            send(move(world, S.ROLLING_BACK), "undo")
            if undo_was_sent
            else move(world, S.PROBATION, grafted=True)
        )
    if world.state == S.IN_DOUBT:
        return move(world, S.NOT_APPLIED)
    if world.state == S.ROLLBACK_FAILED and not world.held:
        return move(world, S.ROLLED_BACK) if rules.missing_is_settled else world
    if world.state == S.KEPT and not world.held:
        return move(world, S.REVERTED)
    return undone_if_leftover(world, rules) if world.held else world


def undone_if_leftover(world: World, rules: Rules) -> World:
    left = world.state in ADAPTATION_ENDED - {S.KEPT}
    asked = any(kind == "undo" and epoch == world.epoch for kind, epoch, _ in world.sent)
    return send(world, "undo") if left and not asked and rules.leftovers_are_undone else world


def server(world: World, rules: Rules) -> Iterator[World]:
    """An answer of the trainer arrives; those of an older epoch are refused."""
    for kind, epoch, seq in world.acks - world.heard:
        if epoch != world.epoch:
            continue
        heard = world._replace(heard=world.heard | {(kind, epoch, seq)})
        if kind == "graft" and world.state in (S.DISPATCHED, S.IN_DOUBT):
            yield move(move(heard, S.ACCEPTED), S.PROBATION, grafted=True)
        elif kind == "graft":
            yield undone_if_leftover(heard, rules)
        elif kind in ("holds", "lacks"):
            yield told(heard, kind)
        elif kind == "failed":
            later = any(k != "graft" and s > seq for k, _, s in world.heard)
            yield heard if later else undo_failed(heard, rules)
        elif world.state == S.ROLLING_BACK:
            yield move(heard, S.ROLLED_BACK)
        elif world.state in UNDO_COUNTS and rules.late_undo_counts:
            yield move(move(heard, S.ROLLING_BACK), S.ROLLED_BACK)
        else:
            yield heard


def told(world: World, answer: str) -> World:
    """The trainer has said whether its model holds the graft; only what is in doubt follows."""
    if world.state != S.IN_DOUBT:
        return world
    if answer == "lacks":
        return move(world, S.ROLLED_BACK if world.grafted else S.NOT_APPLIED)
    if world.grafted or any(kind == "undo" for kind, _, _ in world.sent):
        return send(move(world, S.ROLLING_BACK), "undo")
    return move(move(world, S.ACCEPTED), S.PROBATION, grafted=True)


def undo_failed(world: World, rules: Rules) -> World:
    if world.state in LEAVES_A_REST and not rules.failed_rest_counts:
        return world
    if world.state == S.IN_DOUBT:
        world = move(world, S.ROLLING_BACK)
    fails = world.state == S.ROLLING_BACK or world.state in LEAVES_A_REST
    return move(world, S.ROLLBACK_FAILED) if fails else world


def explore(rules: Rules, until: str = "") -> dict[World, set[World]]:
    """All worlds that can be reached, each with those that follow; or up to the first with a fault.

    Breadth first: a fault is found on the shortest way to it.
    """
    found: dict[World, set[World]] = {}
    waiting = deque([World()])
    while waiting:
        world = waiting.popleft()
        if world in found:
            continue
        steps = {
            after
            for part in (people, time_passes, trainer, server)
            for after in part(world, rules)
            if after != world
        }
        found[world] = steps
        if until in faults(world):
            break
        waiting.extend(steps)
    return found


def faults(world: World) -> set[str]:
    return {
        fault
        for fault, holds in {
            TWICE: world.held > 1,
            UNAPPROVED: bool(world.held) and not world.approved,
            REFUSED: world.state == S.REJECTED and bool(world.sent),
            CALLED_FAILED: world.state == S.ROLLBACK_FAILED
            and not any(kind == "failed" for kind, _, _ in world.heard),
        }.items()
        if holds
    }


def _stuck(worlds: dict[World, set[World]]) -> bool:
    """Some world has no way to an end in which server and model agree."""
    before: dict[World, set[World]] = {}
    for world, steps in worlds.items():
        for after in steps:
            before.setdefault(after, set()).add(world)
    good = {
        world
        for world in worlds
        if world.state in ADAPTATION_ENDED and bool(world.held) == (world.state in STAYS)
    }
    waiting = list(good)
    while waiting:
        for world in before.get(waiting.pop(), ()):
            if world not in good:
                good.add(world)
                waiting.append(world)
    return len(good) < len(worlds)


def test_the_design_never_applies_twice_nor_without_approval_and_never_gets_stuck() -> None:
    worlds = explore(Rules())
    assert len(worlds) > 1000
    assert {fault for world in worlds for fault in faults(world)} == set()
    assert not _stuck(worlds)


@pytest.mark.parametrize(
    ("mutant", "fault"),
    [
        (Rules(compare_and_set=False), REFUSED),
        (Rules(sequence=False), TWICE),
        (Rules(deadline_refuses=False), UNAPPROVED),
        (Rules(fence=False, sequence=False), TWICE),
        (Rules(silence_is_doubt=False), CALLED_FAILED),
    ],
)
def test_a_broken_rule_is_found(mutant: Rules, fault: str) -> None:
    assert any(fault in faults(world) for world in explore(mutant, until=fault))


@pytest.mark.parametrize(
    "rule",
    [
        "leftovers_are_undone",
        "doubt_is_settled",
        "late_undo_counts",
        "missing_is_settled",
        "failed_rest_counts",
    ],
)
def test_a_missing_rule_leaves_a_state_without_a_way_to_a_true_end(rule: str) -> None:
    assert _stuck(explore(replace(Rules(), **{rule: False})))
