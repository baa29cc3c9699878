"""D5: an undo that fails leaves everything as it was, and can be tried again."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from esper import blueprints
from esper.contracts import LayerInfo
from esper.grafting import (
    Receipt,
    RemedyReceipt,
    Snapshot,
    Surroundings,
    apply_graft,
    audit_copies,
    digest,
    let_follow,
    remedies,
    trace_layers,
)
from tests.esper.tiny_models import Training, make_training, surroundings_of

TARGET = "blocks.0.wide"
# An undo runs these files; slot.py, companion.py and copies.py also run on the way back.
UNDO_FILES = tuple(
    f"/grafting/{name}.py"
    for name in (
        "receipts",
        "snapshots/rolling_back",
        "snapshots/host_settings",
        "snapshots/snapshot",
    )
)


class Boom(BaseException):
    pass


@dataclass
class Case:
    """A training with something to undo."""

    training: Training
    around: Surroundings
    receipt: Receipt | RemedyReceipt
    undo: Callable[[], Any]


def layer_of(training: Training, name: str = TARGET) -> LayerInfo:
    tokens = training.batches[0][:, :-1]
    found = trace_layers(training.model, lambda: training.model(tokens))
    return next(info for info in found if info.name == name)


def graft(case_training: Training, around: Surroundings, slug: str = "proj_lora_64") -> Receipt:
    blueprint = blueprints.get_blueprint(slug)
    layer = layer_of(case_training)
    return apply_graft(case_training.model, layer, blueprint, surroundings=around)


def one_graft(*, hard: bool) -> Case:
    training = make_training()
    training.run(2)
    around = surroundings_of(training)
    receipt = graft(training, around)
    training.run(2)
    return Case(training, around, receipt, lambda: receipt.undo(hard=hard))


def hard() -> Case:
    return one_graft(hard=True)


def soft() -> Case:
    return one_graft(hard=False)


def with_acts_of_the_script() -> Case:
    case = one_graft(hard=True)
    model, optimizer = case.training.model, case.training.optimizer
    model.blocks[1].wide.requires_grad_(False)
    model.blocks[1].narrow.register_buffer("mask", torch.ones(2))
    same = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    optimizer.add_param_group({**same, "params": [torch.nn.Parameter(torch.ones(2))]})
    optimizer.state.pop(model.blocks[1].narrow.weight)
    return case


def with_later_grafts() -> Case:
    case = one_graft(hard=True)
    graft(case.training, case.around, "proj_ia3")
    case.training.run(1)
    return case


def with_an_average() -> Case:
    training = make_training()
    average = AveragedModel(training.model)
    training.run(2)
    around = replace(surroundings_of(training), copies=(average.module,))
    receipt = graft(training, around)
    training.run(2)
    average.update_parameters(training.model)
    return Case(training, around, receipt, receipt.undo)


def remedy() -> Case:
    training = make_training()
    training.run(2)
    around = surroundings_of(training)
    receipt = remedies.freeze(training.model, TARGET, surroundings=around)
    training.run(2)
    return Case(training, around, receipt, receipt.undo)


def merged() -> Case:
    training = make_training()
    training.run(2)
    around = surroundings_of(training)
    first = graft(training, around)
    training.run(2)
    receipt = remedies.merge(training.model, first, surroundings=around)
    training.run(2)
    return Case(training, around, receipt, receipt.undo)


CASES = [hard, soft, with_acts_of_the_script, with_later_grafts, with_an_average, remedy, merged]


def fails_at(count: int, monkeypatch: pytest.MonkeyPatch, name: str) -> Callable[[], bool]:
    """Lets the n-th call of a tensor's method raise; the result says whether it was reached."""
    real, calls = getattr(Tensor, name), 0

    def failing(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            raise torch.OutOfMemoryError("injected")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, name, failing)
    return lambda: calls >= count


def raises_at_line(number: int, seen: int = 0) -> Any:

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.endswith(UNDO_FILES):
            return None
        if frame.f_code.co_name == "_remove":
            return None  # Python calls it when a snapshot ends, and catches what it raises
        if event == "line":
            seen += 1
            if seen == number:
                sys.settrace(None)
                raise Boom
        return trace

    return trace


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
@pytest.mark.parametrize("method", ["copy_", "clone", "requires_grad_"])
def test_a_failing_tensor_operation_leaves_everything_as_it_was(
    build: Callable[[], Case], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = build()
    state = Snapshot.take(case.training.model, case.around)
    before = digest(case.training.model)
    for count in range(1, 5000):
        with monkeypatch.context() as patch:
            reached = fails_at(count, patch, method)
            try:
                case.undo()
            except torch.OutOfMemoryError:
                failed = True
            else:
                failed = False
                assert not reached()
        if not failed:
            break
        assert state.differences() == [], count
        assert digest(case.training.model) == before, count
        assert case.receipt.can_undo_hard
    losses_go_on(case)


# The cases run mostly the same lines: each tries as many as there are cases apart, the next case
# the lines beside them.
@pytest.mark.parametrize("every", [len(CASES), pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_an_exception_at_any_line_leaves_everything_as_it_was(
    build: Callable[[], Case], every: int
) -> None:
    lines = lines_of(build)  # first: it uses the random streams
    case = build()
    state = Snapshot.take(case.training.model, case.around)
    before, line = digest(case.training.model), 1
    for line in numbers(lines, every, CASES.index(build)):
        sys.settrace(raises_at_line(line))
        try:
            case.undo()
        except Boom:
            sys.settrace(None)
            assert state.differences() == [], line
            assert digest(case.training.model) == before, line
            assert case.receipt.can_undo_hard
        else:
            break
        finally:
            sys.settrace(None)
    losses_go_on(case)


def lines_of(build: Callable[[], Case]) -> int:
    """How many lines an undo runs."""
    case, counted = build(), itertools.count()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename.endswith(UNDO_FILES) and frame.f_code.co_name != "_remove":
            if event == "line":
                next(counted)
            return trace
        return None

    sys.settrace(trace)
    try:
        case.undo()
    finally:
        sys.settrace(None)
    return next(counted)


def numbers(lines: int, every: int, place: int) -> Any:
    """Of the first and last lines, and some between: the same run for each tensor."""
    assert lines > 300, "the injection reaches no depth"
    yield from range(1 + place % every, 120, every)
    yield from range(120 + place % every, lines - 80, 67)
    yield from range(lines - 80 + place % every, lines + 100, every)


def losses_go_on(case: Case) -> None:
    """The undo that did succeed is the one that an undo without a failure is."""
    assert not case.receipt.can_undo_hard
    assert audit_copies(case.training.model) == []
    let_follow(case.training.model, case.around.copies)
    case.training.run(2)


@pytest.mark.parametrize("build", [hard, with_later_grafts, remedy], ids=lambda b: b.__name__)
def test_an_undo_after_a_failed_one_is_exact(
    build: Callable[[], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = build()
    with monkeypatch.context() as patch:
        fails_at(9, patch, "copy_")
        with pytest.raises(torch.OutOfMemoryError):
            case.undo()
    case.training.run(1)
    undone = case.undo()
    assert undone.exact
    assert undone.digest == case.receipt.digest_before
    assert digest(case.training.model) == case.receipt.digest_before
