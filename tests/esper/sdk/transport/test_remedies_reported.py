"""What a script does by itself reaches the server, and a server cannot undo what is merged."""

from __future__ import annotations

import time
from typing import Any

import pytest

from esper.contracts import AdaptationState, CommandKind
from esper.grafting import RemedyReceipt, digest
from esper.grafting.remedies import freeze
from tests.esper.sdk.tiny_training import Training
from tests.esper.sdk.transport.attached import (
    ended,
    final_ack,
    graft_command,
    kernel_for,
    listening,
)
from tests.esper.sdk.transport.control_plane import ControlPlane, wait_for

SLOW_MS = 50.0  # a remedy takes at least as long


def reports(plane: ControlPlane, count: int) -> list[dict[str, Any]]:
    wait_for(lambda: len(plane.remedies) >= count, f"{count} remedies are reported")
    assert len({report["key"] for report in plane.remedies}) == len(plane.remedies) == count
    return plane.remedies


def test_a_remedy_and_its_undo_are_reported_with_digests(
    training: Training, plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: Any, **options: Any) -> RemedyReceipt:
        time.sleep(SLOW_MS / 1e3)
        return freeze(*args, **options)

    monkeypatch.setattr("esper.grafting.remedies.freeze", slow)
    with listening(training, plane) as session:
        before, started = digest(training.model), time.perf_counter()
        receipt = session.freeze("3")
        waited_ms = (time.perf_counter() - started) * 1e3
        session.undo(receipt)
        first, second = reports(plane, 2)
    assert (first["remedy"], first["layer"], first["step"]) == ("freeze", "3", 1)
    assert first["digest_before"] == first["digest_after"] == before
    assert SLOW_MS <= first["pause_ms"] <= waited_ms
    assert (second["remedy"], second["undoes"]) == ("undo", first["key"])
    assert (second["exact"], second["digest_after"]) == (True, before)


def test_a_graft_that_the_server_keeps_may_be_merged_and_is_then_not_undone(
    training: Training, plane: ControlPlane
) -> None:
    with listening(training, plane) as session:
        plane.send(graft_command(plane, 1, kernel_for(session, plane)))
        training.until(lambda: ended(plane, 1), session)
        (kept,) = session.adaptations
        plane.send(plane.command(CommandKind.KEEP, 2, adaptation="a1"))
        training.until(lambda: ended(plane, 2), session)
        assert kept.state is AdaptationState.KEPT
        assert kept.receipt is not None
        merge = session.merge(kept.receipt)
        (report,) = reports(plane, 1)
        assert (report["remedy"], report["adaptation"]) == ("merge", "a1")
        assert report["digest_before"] == merge.digest_before != report["digest_after"]
        merged = digest(training.model)
        plane.send(plane.command(CommandKind.UNDO, 3, adaptation="a1", payload={"hard": True}))
        training.until(lambda: ended(plane, 3), session)
        answer = final_ack(plane, 3)
        assert (answer["state"], answer["code"]) == ("refused", "merged")
        assert kept.state is AdaptationState.KEPT
        assert merged == report["digest_after"]


def test_pruning_what_the_server_grafted_is_reported_with_all_that_went(
    training: Training, plane: ControlPlane
) -> None:
    with listening(training, plane) as session:
        plane.send(graft_command(plane, 1, kernel_for(session, plane)))
        training.until(lambda: ended(plane, 1), session)
        own = session.graft("0", "proj_ia3")
        (grafted, _) = session.adaptations
        assert grafted.receipt is not None
        session.undo(grafted.receipt)  # the later one goes with it
        assert not own.present
        first, second = reports(plane, 2)
    assert (first["remedy"], first["adaptation"], first["exact"]) == ("undo", "a1", True)
    assert first["back_to_step"] == second["back_to_step"] == grafted.step
    assert (second["adaptation"], second["details"]) == (
        "",
        {"blueprint": "proj_ia3", "along_with": "proj_lora_64 at 3"},
    )
