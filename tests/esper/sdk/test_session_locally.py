"""A session with no server: it watches, grafts, undoes, saves, and never harms the training."""

from __future__ import annotations

import copy
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import esper
from esper.contracts import AdaptationState, SafetyPolicy, Signal, ViolationRule
from esper.exceptions import (
    ConfigurationError,
    IncompatibleLayerError,
    UndoError,
    UnknownBlueprintError,
    UnknownLayerError,
)
from esper.grafting import digest
from tests.esper.sdk.tiny_training import Training, slot_at, weight_of


def attached(training: Training, **options: object) -> esper.Session:
    return esper.attach(
        training.model,
        training.optimizer,
        scheduler=training.scheduler,
        **options,  # type: ignore[arg-type]
    )


def test_being_watched_leaves_the_losses_equal_to_the_bit() -> None:
    alone = Training().run(130)
    training = Training()
    with attached(training, evaluate=training.evaluate) as session:
        watched = training.run(130, session)
    assert watched == alone


def test_layers_are_known_after_the_first_step(training: Training) -> None:
    with attached(training) as session:
        training.run(1, session)
        assert [layer.name for layer in session.layers] == ["0", "3", "5"]
        assert session.layers[0].in_shape == (32, 8)


def test_frames_hold_numbers_of_every_layer(training: Training) -> None:
    with attached(training) as session:
        assert session.frame() is None
        training.run(60, session)
        frame = session.frame()
    assert frame is not None
    assert frame.layers == ("0", "3", "5")
    assert np.isfinite(frame.column(Signal.GRAD_NORM)).all()
    assert math.isfinite(frame.metrics["loss"])


def test_a_graft_and_its_hard_undo_leave_no_trace_in_the_losses() -> None:
    alone = Training().run(30)
    training = Training()
    with attached(training) as session:
        before = training.run(10, session)
        receipt = session.graft("3", "proj_lora_64")
        training.run(7, session)
        report = session.undo(receipt)
        after = training.run(20, session)
    assert report.exact
    assert before + after == alone


def test_a_soft_undo_keeps_what_the_host_has_learnt(training: Training) -> None:
    with attached(training) as session:
        training.run(5, session)
        receipt = session.graft("3", "proj_lora_64")
        training.run(5, session)
        weights = weight_of(training.model, "3").clone()
        session.undo(receipt, hard=False)
        assert torch.equal(weight_of(training.model, "3"), weights)
        assert len(training.optimizer.param_groups) == 1
        with pytest.raises(UndoError):
            session.undo(receipt)


def test_grafts_train_and_the_parameter_groups_stay_right(training: Training) -> None:
    with attached(training) as session:
        training.run(5, session)
        receipt = session.graft("3", "mlp_gelu_2048")
        start = [p.detach().clone() for p in receipt.graft.parameters()]
        training.run(5, session)
        moved = [
            not torch.equal(old, new)
            for old, new in zip(start, receipt.graft.parameters(), strict=True)
        ]
        assert all(moved)
        assert session.findings() == []
        assert [entry.state for entry in session.adaptations] == [AdaptationState.PROBATION]


def test_a_parameter_that_no_optimizer_holds_is_found_at_attach(training: Training) -> None:
    model = copy.deepcopy(training.model)  # the optimizer of the other one holds all of it
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with esper.attach(model, optimizer) as session:
        found = session.findings()
        tensors = {(finding.layer, finding.observed.split(":")[0]) for finding in found}
        rules = {finding.rule for finding in found}
    assert rules == {ViolationRule.OPTIMIZER_LEDGER}
    assert tensors == {("3", "weight"), ("3", "bias"), ("5", "weight"), ("5", "bias")}


@pytest.mark.parametrize(
    ("layer", "blueprint", "config", "error"),
    [
        ("3", "no_such_thing", {}, UnknownBlueprintError),
        ("nowhere", "proj_lora_64", {}, UnknownLayerError),
        ("3", "attn_std", {}, IncompatibleLayerError),
        ("3", "proj_lora_64", {"colour": "red"}, ConfigurationError),
    ],
)
def test_a_refused_graft_leaves_the_model_as_it_was(
    training: Training, layer: str, blueprint: str, config: dict[str, str], error: type[Exception]
) -> None:
    with attached(training) as session:
        training.run(3, session)
        before = digest(training.model)
        with pytest.raises(error):
            session.graft(layer, blueprint, **config)
        assert digest(training.model) == before
        assert len(training.optimizer.param_groups) == 1


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")], ids=["not a number", "infinite"])
def test_a_loss_that_is_not_finite_after_a_graft_takes_it_out_at_once(
    training: Training, spoiled: float
) -> None:
    with attached(training) as session:
        training.run(30, session)
        before = digest(training.model)
        session.graft("3", "proj_lora_64")
        training.run(3, session)
        training.spoil = lambda loss: loss * spoiled
        training.step(session)
        assert session.adaptations[0].state is AdaptationState.ROLLED_BACK
        assert digest(training.model) == before
        training.spoil = lambda loss: loss
        assert all(math.isfinite(loss) for loss in training.run(10, session))


def test_a_gradient_that_is_not_finite_is_seen_before_the_loss_is(training: Training) -> None:
    with attached(training) as session:
        training.run(30, session)
        receipt = session.graft("3", "proj_lora_64")
        weight = next(receipt.graft.parameters())
        handle = weight.register_hook(lambda grad: grad * float("nan"))  # type: ignore[no-untyped-call]
        training.step(session)
        handle.remove()
        assert session.adaptations[0].state is AdaptationState.ROLLED_BACK
        assert all(math.isfinite(loss) for loss in training.run(5, session))


def test_a_blow_up_is_rolled_back_within_three_steps(training: Training) -> None:
    with attached(training) as session:
        training.run(30, session)
        session.graft("3", "proj_lora_64")
        training.spoil = lambda loss: loss * 0 + 1e4
        training.run(3, session)
        assert session.adaptations[0].state is AdaptationState.ROLLED_BACK


@pytest.mark.parametrize("hard", [True, False])
def test_losses_that_an_undo_took_back_are_no_measure_for_the_next_graft(
    training: Training, hard: bool
) -> None:
    with attached(training) as session:
        training.run(30, session)
        first = session.graft("3", "proj_lora_64")
        training.spoil = lambda loss: loss / 10
        training.run(30, session)
        session.undo(first, hard=hard)
        training.spoil = lambda loss: loss
        training.run(5, session)  # the level of before: no spike
        session.graft("3", "proj_lora_64")
        training.run(10, session)
        _, second = session.adaptations
        found = session.findings()
    assert second.state is AdaptationState.PROBATION
    assert not found
    steps = [step for step, _ in second.loss_before]
    assert not [step for step in steps if 30 < step <= 60]


def test_divergence_without_a_graft_is_reported_and_nothing_is_touched(training: Training) -> None:
    with attached(training) as session:
        training.run(30, session)
        before = digest(training.model)
        session.step(float("nan"))
        assert digest(training.model) == before
        assert [finding.rule for finding in session.findings()] == [str(ViolationRule.NON_FINITE)]


def test_a_loss_that_stays_high_is_reported_once(training: Training) -> None:
    with attached(training) as session:
        training.run(30, session)
        for step in range(60):
            session.step(1e4 + step)
        rules = [finding.rule for finding in session.findings()]
        assert rules == [str(ViolationRule.LOSS_BLOW_UP)]


def test_evaluation_leaves_random_streams_and_modes_alone() -> None:
    alone = Training().run(160)
    training = Training()
    seen: list[bool] = []

    def evaluate() -> float:
        seen.append(training.model.training)
        random.random()
        np.random.rand()
        torch.rand(3)
        return training.evaluate()

    random.seed(1)
    expected = random.getstate()
    with attached(training, evaluate=evaluate) as session:
        assert training.run(160, session) == alone
    assert seen
    assert not any(seen)  # evaluated in eval mode
    assert training.model.training
    assert random.getstate() == expected


def test_a_graft_is_tried_on_and_off_at_the_end_of_probation(training: Training) -> None:
    policy = SafetyPolicy(maturity_steps=5, probation_steps=20)
    with attached(training, evaluate=training.evaluate, safety_policy=policy) as session:
        training.run(10, session)
        receipt = session.graft("3", "proj_lora_64")
        training.run(20, session)
        entry = session.adaptations[0]
        on = _evaluated(training)
        slot = slot_at(training.model, "3")
        graft = slot._modules.pop("proj_lora_64")
        off = _evaluated(training)
        slot._modules["proj_lora_64"] = graft
    assert receipt.present
    assert entry.ablation_gain == pytest.approx(off - on, abs=1e-7)


def _evaluated(training: Training) -> float:
    training.model.eval()
    with torch.no_grad():
        loss = training.evaluate()
    training.model.train()
    return loss


def test_esper_never_raises_into_the_training() -> None:
    def broken() -> float:
        raise RuntimeError("the user's evaluation is broken")

    alone = Training().run(450)
    training = Training()
    with attached(training, evaluate=broken) as session:
        assert training.run(450, session) == alone
        assert any("evaluation" in finding.observed for finding in session.findings())


@pytest.mark.parametrize(
    "loss", ["0.5", torch.ones(2), True, {"loss": 0.5}, [0.5], torch.tensor(0.5 + 1j), 10**400]
)
def test_a_loss_that_is_none_is_refused(training: Training, loss: object) -> None:
    with attached(training) as session, pytest.raises(TypeError, match="the loss must"):
        session.step(loss)  # type: ignore[arg-type]


def test_arguments_that_make_no_sense_are_refused_before_anything_is_touched(
    training: Training,
) -> None:
    names = [name for name, _ in training.model.named_modules()]
    model, optimizer = training.model, training.optimizer
    for wrong in (
        {"mode": "wild"},
        {"run": ""},
        {"server": "ftp://somewhere", "token": "esp_x"},
        {"server": "http://somewhere"},  # no token
        {"slots": ["0", "nowhere"]},
        {"slots": "0"},
        {"target_steps": 0},
    ):
        with pytest.raises((ConfigurationError, UnknownLayerError)):
            esper.attach(model, optimizer, **wrong)
    with pytest.raises(ConfigurationError):
        esper.attach(model, object())
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler's own
def test_a_compiled_model_is_watched_and_grafted(training: Training) -> None:
    training.model = torch.compile(training.model, backend="eager")  # type: ignore[assignment]
    with attached(training) as session:
        training.run(25, session)
        receipt = session.graft("3", "proj_lora_64")
        loss = training.step(session)
        assert math.isfinite(loss)
        assert any(p.grad is not None for p in receipt.graft.parameters())


def test_only_named_slots_can_be_grafted(training: Training) -> None:
    with attached(training, slots=["3"]) as session:
        training.run(2, session)
        session.graft("3", "proj_lora_64")
        with pytest.raises(IncompatibleLayerError, match="leave it alone"):
            session.graft("0", "proj_lora_64")


def test_an_exported_model_computes_the_same_with_nothing_of_esper_inside(
    training: Training, tmp_path: Path
) -> None:
    with attached(training) as session:
        training.run(5, session)
        session.graft("0", "proj_ia3")
        session.graft("3", "mlp_gelu_2048")
        session.graft("5", "mon_act_stats")
        training.run(5, session)
    plain = esper.export(training.model)
    x = torch.randn(6, 8)
    expected = training.model.eval()(x)
    assert torch.allclose(plain.eval()(x), expected, atol=1e-6)
    assert not any("esper" in name.split(".") for name, _ in plain.named_modules())
    assert not any(module._forward_hooks for module in plain.modules())
    assert any("esper" in name.split(".") for name, _ in training.model.named_modules())


RESUME = """
import sys
import torch
from tests.esper.sdk.tiny_training import Training, slot_at, weight_of
import esper

saved = torch.load(sys.argv[1], weights_only=True)
training = Training(seed=99)
session = esper.attach(training.model, training.optimizer, scheduler=training.scheduler)
session.load_state_dict(saved["session"])
training.model.load_state_dict(saved["model"])
training.scheduler.load_state_dict(saved["scheduler"])
training.rule = saved["rule"]
torch.set_rng_state(saved["rng"])
assert [entry.blueprint for entry in session.adaptations] == ["proj_lora_64"]
print([loss.hex() for loss in training.run(20, session)])
"""


def test_a_grafted_run_goes_on_in_a_new_process_to_the_bit(
    training: Training, tmp_path: Path
) -> None:
    with attached(training) as session:
        training.run(10, session)
        session.graft("3", "proj_lora_64")
        training.run(10, session)
        path = tmp_path / "checkpoint.pt"
        state = {
            "session": session.state_dict(),
            "model": training.model.state_dict(),
            "scheduler": training.scheduler.state_dict(),
            "rule": training.rule,
            "rng": torch.get_rng_state(),
        }
        torch.save(state, path)
        expected = [loss.hex() for loss in training.run(20, session)]
    answer = subprocess.run(
        [sys.executable, "-c", RESUME, str(path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=_environment(),
    )
    assert answer.stderr == ""
    assert answer.stdout.strip() == str(expected)


def _environment() -> dict[str, str]:
    here = Path(__file__).resolve().parent
    own = {"PYTHONPATH": str(here.parents[1]), "OMP_NUM_THREADS": "1", "ESPER_VERBOSE": "0"}
    return {**os.environ, **own}


def test_a_graft_out_of_a_checkpoint_can_still_be_taken_out(training: Training) -> None:
    with attached(training) as session:
        training.run(5, session)
        session.graft("3", "proj_lora_64")
        training.run(3, session)
        state, model = session.state_dict(), training.model.state_dict()
        optimizer = training.optimizer.state_dict()
    later = Training(seed=5)
    with attached(later) as resumed:
        resumed.load_state_dict(state)
        later.model.load_state_dict(model)
        later.optimizer.load_state_dict(optimizer)  # puts other dicts in the groups' place
        receipt = resumed.adaptations[0].receipt
        assert receipt is not None
        later.run(3, resumed)
        with pytest.raises(UndoError, match="soft undo"):
            resumed.undo(receipt)
        resumed.undo(receipt, hard=False)
        assert len(later.optimizer.param_groups) == 1
        assert resumed.findings() == []
        later.run(3, resumed)


def test_a_state_is_refused_once_training_has_begun(training: Training) -> None:
    with attached(training) as session:
        training.run(1, session)
        with pytest.raises(ConfigurationError, match="before its first step"):
            session.load_state_dict(session.state_dict())
        with pytest.raises(ConfigurationError, match="not the state"):
            session.load_state_dict({"model": {}})


def test_a_closed_session_says_so(training: Training) -> None:
    session = attached(training)
    training.run(1, session)
    session.close()
    session.close()
    with pytest.raises(ConfigurationError, match="closed"):
        training.step(session)


def test_contracts_and_constraints_are_imported_without_torch() -> None:
    code = (
        "import sys, esper, esper.contracts, esper.constraints, esper.exceptions\n"
        "assert esper.__version__ == '0.1.0'\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600, env=_environment())
