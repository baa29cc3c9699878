"""D1 and D6 in scripts that are written in other ways than those Esper was made with."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import Session
from esper.exceptions import (
    ConfigurationError,
    EsperError,
    IncompatibleLayerError,
    UndoError,
)
from esper.fail_closed import FailClosed
from esper.grafting import LayerRecorder
from esper.sdk.copied_session import CopiedSession
from tests.esper.contract_with_host.failed_parts import failed_parts

Copying = Callable[[Any], Any]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, session: Any) -> float:
    loss: Tensor = model(torch.ones(4, 8)).pow(2).mean()
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    session.step(loss)
    return float(loss.detach())


def attached(model: nn.Module, mode: Any = "observe") -> tuple[torch.optim.Optimizer, Session]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return optimizer, esper.attach(model, optimizer, run="stranger", mode=mode, verbose=False)


def saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class KeepsItsSession(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 4)
        self.session: Any = None

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x)
        return found


def kept_in_a_model() -> tuple[Any, Session]:
    model = KeepsItsSession()
    optimizer, model.session = attached(model)
    step(model, optimizer, model.session)
    return model, model.session


def kept_in_a_callback(module: str) -> tuple[Any, Session]:
    callback = pytest.importorskip(module).EsperCallback(run="stranger")
    model = nn.Linear(8, 4)
    optimizer, callback.session = attached(model)
    step(model, optimizer, callback.session)
    if hasattr(callback, "_held_out"):
        callback._losses.follow(model, callback.session._parts.fail_closed)
    return callback, callback.session


KEEPERS: dict[str, Callable[[], tuple[Any, Session]]] = {
    "a model": kept_in_a_model,
    "Lightning's callback": lambda: kept_in_a_callback("esper.sdk.lightning"),
    "the Trainer's callback": lambda: kept_in_a_callback("esper.sdk.huggingface"),
}
COPIES: dict[str, Copying] = {
    "deepcopy": copy.deepcopy,
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("copying", COPIES)
@pytest.mark.parametrize("keeper", KEEPERS)
def test_what_keeps_its_session_is_copied_and_saved(keeper: str, copying: str) -> None:
    kept, session = KEEPERS[keeper]()

    copied = COPIES[copying](kept)

    assert kept.session is session
    assert not session.closed
    if copied.session is None:  # a callback makes one in its next training
        return
    with copied.session as watched:
        assert watched.closed
        watched.step(1.0)
        watched.report(accuracy=0.5)
    with pytest.raises(AttributeError, match="Attach the copied model"):
        watched.graft("body", "proj_lora_64")
    assert not session.closed
    assert torch.equal(copied(torch.ones(4, 8)), kept(torch.ones(4, 8)))


class NamedAsASlot(nn.Module):
    """Its author calls some layers as Esper calls its slots."""

    def __init__(self) -> None:
        super().__init__()
        self.esper = nn.Linear(8, 16)
        self.head = nn.Sequential(nn.Linear(16, 16))
        self.head.add_module("esper", nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.esper(x)))
        return found


@pytest.mark.parametrize("mode", ["observe", "supervised"])
def test_a_model_with_layers_named_esper_loads_its_own_states(mode: str) -> None:
    torch.manual_seed(0)
    model = NamedAsASlot()
    optimizer, session = attached(model, mode)
    step(model, optimizer, session)
    before = copy.deepcopy(model.state_dict())
    kept = session.state_dict()

    receipt = session.graft("head.0", "mlp_gelu_2048")
    step(model, optimizer, session)
    with_graft = copy.deepcopy(model.state_dict())
    model.head.load_state_dict(model.head.state_dict())
    assert receipt.present

    model.load_state_dict(before)
    assert model.state_dict().keys() == before.keys()
    model.load_state_dict(with_graft)
    assert all(torch.equal(model.state_dict()[name], with_graft[name]) for name in with_graft)
    esper.load_state_dict(NamedAsASlot(), with_graft)
    model.load_state_dict(before)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert not kept["grafts"]


def test_folders_stay_where_they_were_when_the_script_changes_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "outputs"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    session = esper.attach(
        model,
        optimizer,
        run="stranger",
        mode="supervised",
        verbose=False,
        good_states="states",
        snapshot_folder="snapshots",
        snapshot_memory=1e-9,
    )
    monkeypatch.chdir(elsewhere)
    for _ in range(3):
        step(model, optimizer, session)

    assert session.undo(session.graft("2", "proj_lora_64")).exact
    session.close()
    assert list(elsewhere.iterdir()) == []


class Merging(nn.Linear):
    """As loralib's: in eval mode its adapter is in the weight, and is not computed beside it."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.merged = False
        self.down = nn.Parameter(torch.randn(2, 8))
        self.up = nn.Parameter(torch.zeros(4, 2))

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if self.merged is mode:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).detach()
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        return result if self.merged else result + x @ self.down.T @ self.up.T


class Averaging(nn.Linear):
    """In eval mode it uses another weight, which it makes when that mode begins."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.smooth: Tensor | None = None

    def eval(self) -> Averaging:
        super().eval()
        self.smooth = self.weight.detach().round(decimals=2)
        return self

    def train(self, mode: bool = True) -> Averaging:
        super().train(mode)
        self.smooth = None
        return self

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight if self.smooth is None else self.smooth)


@pytest.mark.parametrize("returns_to_train", [True, False])
@pytest.mark.parametrize("kind", [Merging, Averaging])
def test_an_evaluation_ends_as_the_models_own_train_ends_it(
    kind: type[nn.Module], returns_to_train: bool
) -> None:
    """Where ``train`` does more than set a flag, the flag alone leaves the model half evaluated."""
    losses: list[list[float]] = []
    for watches in (False, True):
        torch.manual_seed(0)
        model = kind()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        evaluated: list[float] = []

        def evaluate(model: nn.Module = model, evaluated: list[float] = evaluated) -> float:
            model.eval()
            evaluated.append(float(model(torch.ones(4, 8)).pow(2).mean()))
            if returns_to_train:
                model.train()
            return evaluated[-1]

        options: dict[str, Any] = {"run": "modes", "mode": "supervised", "verbose": False}
        session: Any = CopiedSession()
        if watches:
            session = esper.attach(model, optimizer, evaluate=evaluate, **options)
        losses.append([step(model, optimizer, session) for _ in range(105)])

    assert evaluated, "it was evaluated"
    assert all(module.training for module in model.modules())
    assert losses[0] == losses[1]


def test_the_trainers_callback_reads_the_loss_of_a_model_that_returns_a_tuple() -> None:
    class Net(nn.Linear):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            logits = super().forward(x)
            return (logits,) if labels is None else ((logits - labels).pow(2).mean(), logits)

    callback = pytest.importorskip("esper.sdk.huggingface").EsperCallback(run="stranger")
    model = Net(8, 4)
    callback._losses.follow(model, FailClosed())
    model(torch.ones(2, 8))
    loss, _ = model(torch.ones(2, 8), labels=torch.zeros(2, 4))
    callback._losses.stop()

    assert torch.equal(callback._losses.take(), loss)


def kept_states(model: nn.Module) -> Any:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def kept_copies(model: nn.Module) -> Any:
    return copy.deepcopy(model)


def kept_lists(model: nn.Module) -> Any:
    return [parameter.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("keep", [kept_states, kept_copies, kept_lists])
def test_what_a_script_keeps_in_inference_mode_is_in_nobodys_way(
    keep: Callable[[nn.Module], Any],
) -> None:
    """Torch counts no writes of a tensor that was made there, and raises when it is asked."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.inference_mode():
        best = [keep(model)]
    optimizer, session = attached(model, "supervised")
    step(model, optimizer, session)
    with torch.inference_mode():
        best.append(keep(model))
        receipt = session.graft("2", "mlp_gelu_2048")
    step(model, optimizer, session)
    with torch.inference_mode():
        assert session.undo(receipt).exact
    step(model, optimizer, session)

    assert not failed_parts(session)
    assert len(best) == 2


def test_an_average_that_is_kept_in_inference_mode_is_seen_to_change() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.inference_mode():
        average = kept_states(model)
    optimizer, session = attached(model, "supervised")
    for _ in range(3):
        step(model, optimizer, session)
        with torch.inference_mode():
            for name, tensor in model.state_dict().items():
                average[name].lerp_(tensor, 0.5)

    with pytest.raises(IncompatibleLayerError, match="average by hand"):
        session.graft("2", "mlp_gelu_2048")


def test_an_optimizers_own_entries_are_no_left_over_state() -> None:
    model = nn.Linear(8, 4)
    optimizer, session = attached(model)
    optimizer.state["calls"] = {"count": 1}  # type: ignore[index]
    step(model, optimizer, session)

    assert session.findings() == []


class NamesItsParameters(nn.Module):
    """Its names are those of its checkpoints, as in some large training frameworks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ((f"saved.{name}", p) for name, p in self.net.named_parameters())

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"saved.{name}": tensor for name, tensor in self.net.state_dict().items()}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return self.net.load_state_dict({name[6:]: t for name, t in state.items()}, strict)


@pytest.mark.parametrize("mode", ["observe", "supervised"])
def test_a_model_that_names_its_parameters_itself_is_watched_and_grafted(mode: str) -> None:
    model = NamesItsParameters()
    optimizer, session = attached(model, mode)
    step(model, optimizer, session)
    before = copy.deepcopy(model.state_dict())

    receipt = session.graft("net.2", "mlp_gelu_2048")
    step(model, optimizer, session)
    assert session.undo(receipt).exact
    session.graft("net.2", "mlp_gelu_2048")
    step(model, optimizer, session)
    model.load_state_dict(before)

    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert not failed_parts(session)


def test_a_diagnosis_that_cannot_begin_is_said_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise LookupError("unusual")

    monkeypatch.setattr("esper.sdk.diagnosing.Recorder", fail)
    model = nn.Linear(8, 4)
    optimizer, session = attached(model, "automatic")
    for _ in range(3):
        step(model, optimizer, session)

    assert "Nobody looks for faults of the run" in str(session.findings()[0])
    assert failed_parts(session) == {"diagnosis"}


class Holds:
    """A wrapper that steps an optimizer, and is none itself."""

    def __init__(self, name: str, optimizer: Any) -> None:
        vars(self)[name] = optimizer


@pytest.mark.parametrize("name", ["optimizer", "opt", "_optimizer", "any_other"])
def test_the_optimizer_is_found_in_a_wrapper_that_is_none(name: str) -> None:
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    session = esper.attach(model, Holds(name, optimizer), run="stranger", verbose=False)
    step(model, optimizer, session)
    session.close()

    with pytest.raises(ConfigurationError, match="nor a wrapper that shows one"):
        esper.attach(model, Holds(name, "another kind"), verbose=False)


class Lookahead(torch.optim.Optimizer):
    """As in most scripts that have one: torch's ``__init__`` is not called."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        self.param_groups, self.state, self.defaults = base.param_groups, base.state, base.defaults

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)


class Signs(torch.optim.Optimizer):
    """As above, and there is none inside."""

    def __init__(self, parameters: Any, lr: float) -> None:
        self.defaults: dict[str, Any] = {"lr": lr}
        self.param_groups, self.state = [{"params": [*parameters], "lr": lr}], {}  # type: ignore[assignment]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad.sign()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None


UNMADE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "around another": lambda own: Lookahead(torch.optim.Adam(own, lr=0.01)),
    "alone": lambda own: Signs(own, lr=0.01),
}


@pytest.mark.parametrize("mode", ["observe", "supervised"])
@pytest.mark.parametrize("kind", UNMADE)
def test_an_optimizer_that_is_half_made_is_watched_and_its_grafts_train(
    kind: str, mode: str
) -> None:
    losses = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        optimizer = UNMADE[kind](model.parameters())
        session: Any = CopiedSession()
        if watched:
            options: dict[str, Any] = {"run": "half", "mode": mode, "verbose": False}
            session = esper.attach(model, optimizer, **options)
        losses.append([step(model, optimizer, session) for _ in range(12)])

    assert losses[0] == losses[1]
    assert session.frame() is not None
    session.graft("0", "mlp_gelu_2048")
    for _ in range(3):
        step(model, optimizer, session)
    assert not failed_parts(session)
    assert not session.findings()


class TwoSteps(torch.optim.Optimizer):
    """As SAM: the gradients of the update are gone before ``step`` returns."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.inside = torch.optim.SGD(self.param_groups, lr=lr)
        self.param_groups = self.inside.param_groups

    def step(self, closure: Any) -> None:  # type: ignore[override]
        self.zero_grad()
        closure()
        self.inside.step()
        self.zero_grad()


def test_the_gradients_of_an_optimizer_around_another_are_read() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = TwoSteps(model.parameters(), lr=0.1)
    session = esper.attach(model, optimizer, run="sam", verbose=False)
    for _ in range(30):
        x = torch.randn(8, 8)

        def loss(x: Tensor = x) -> Tensor:
            return (model(x) - 1.0).square().mean()

        optimizer.step(lambda loss=loss: torch.autograd.backward(loss()))
        session.step(loss())

    assert not session.findings()


RECEIPTS: dict[str, Callable[[Any, Any], Any]] = {
    "a graft": lambda model, session: session.graft("body", "proj_lora_64"),
    "a remedy": lambda model, session: session.set_lr("body", 0.5),
    "a graft without a run": lambda model, session: esper.graft(
        model, "body", "proj_lora_64", optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    ),
}


@pytest.mark.parametrize("kind", RECEIPTS)
def test_what_keeps_a_receipt_is_copied_and_saved(kind: str) -> None:
    model: Any = KeepsItsSession()
    optimizer, session = attached(model, "supervised")
    step(model, optimizer, session)
    model.receipt = RECEIPTS[kind](model, session)

    for copied in (copy.deepcopy(model), saved_and_loaded(model)):
        assert str(copied.receipt) == str(model.receipt)
        with pytest.raises(UndoError, match="use the receipt itself"):
            copied.receipt.undo()
    assert model.receipt.undo().exact


@pytest.mark.parametrize("grafted", [False, True])
def test_a_model_is_sent_to_another_process_without_a_warning(grafted: bool) -> None:
    """Warnings are errors here. Torch warns of a hook that another process would not have."""
    model = nn.Linear(8, 4)
    optimizer, session = attached(nn.Sequential(model), "supervised")
    step(model, optimizer, session)
    if grafted:
        session.graft("0", "proj_lora_64")
    for _ in range(3):
        step(model, optimizer, session)

    sent = ForkingPickler.loads(ForkingPickler.dumps(model))
    assert torch.equal(sent(torch.ones(4, 8)), model(torch.ones(4, 8)))


class Adapted(nn.Module):
    """As adapters do: it takes the place of a layer, and has it as a child."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.up = nn.Parameter(torch.zeros(base.out_features, base.in_features))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x) + x @ self.up.T
        return found


@pytest.mark.parametrize("averaged", [False, True])
def test_a_graft_goes_on_in_a_layer_that_the_script_puts_into_another_one(averaged: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    average = copy.deepcopy(model) if averaged else None
    optimizer, session = attached(model, "supervised")
    if average is not None:
        with torch.no_grad():
            average[0].weight.mul_(0.9)
    step(model, optimizer, session)
    receipt = session.graft("2", "mlp_gelu_2048")
    step(model, optimizer, session)

    model[2] = Adapted(model[2])
    optimizer.add_param_group({"params": [model[2].up]})
    before = [p.detach().clone() for p in receipt.graft.parameters()]
    for _ in range(3):
        step(model, optimizer, session)
    (adaptation,) = session.adaptations
    assert (receipt.layer, adaptation.layer, receipt.present) == ("2.base", "2.base", True)
    assert not any(map(torch.equal, before, receipt.graft.parameters()))

    fresh = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Adapted(nn.Linear(16, 4)))
    esper.load_state_dict(fresh, model.state_dict())
    assert torch.equal(fresh(torch.ones(4, 8)), model(torch.ones(4, 8)))
    session.undo(receipt)
    assert not any("esper" in name for name in model.state_dict())
    step(model, optimizer, session)
    assert not failed_parts(session)


@pytest.mark.parametrize("skipped", [1, 5])
def test_layers_are_known_where_the_script_skips_its_first_batches(skipped: int) -> None:
    """As a Lightning ``training_step`` that returns None before it runs a layer."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer, session = attached(model, "supervised")
    for _ in range(skipped):
        session.step()
    for _ in range(10):
        step(model, optimizer, session)

    assert [layer.in_shape for layer in session.layers] == [(4, 8), (4, 16)]
    assert session.frame() is not None
    assert session.undo(session.graft("2", "proj_lora_64")).exact


def test_a_model_that_never_runs_is_opened_all_the_same() -> None:
    _, session = attached(nn.Sequential(nn.Linear(8, 4)), "supervised")
    for _ in range(60):
        session.step(1.0)

    assert session._parts.layers.fixed
    with pytest.raises(IncompatibleLayerError, match="did not run"):
        session.graft("0", "proj_lora_64")


class Routed(nn.Module):
    """Each batch goes through one of the experts; some come late, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(4)
        )
        self.head = nn.Linear(8, 4)
        self.batches = 0

    def forward(self, x: Tensor) -> Tensor:
        self.batches += 1
        chosen = 0 if self.batches < 10 else self.batches % 3
        found: Tensor = self.head(self.experts[chosen](x))
        return found


@pytest.mark.parametrize("mode", ["observe", "supervised"])
def test_a_layer_is_known_once_it_runs(mode: str) -> None:
    torch.manual_seed(0)
    model = Routed()
    optimizer, session = attached(model, mode)
    for _ in range(9):
        step(model, optimizer, session)
    assert [layer.name for layer in session.layers if layer.in_shape] == [
        "experts.0.0", "experts.0.2", "head",
    ]  # fmt: skip
    with pytest.raises(IncompatibleLayerError, match="did not run"):
        session.graft("experts.1.2", "proj_lora_64")

    for _ in range(600):
        step(model, optimizer, session)
    late = {layer.name: layer for layer in session.layers}
    assert late["experts.1.0"].in_shape == late["experts.2.2"].in_shape == (4, 8)
    assert late["experts.2.0"].feeds == ("experts.2.2",)
    assert not late["experts.3.0"].in_shape
    session.graft("experts.1.2", "mlp_gelu_2048", since="experts.1.0")
    for _ in range(6):
        step(model, optimizer, session)
    assert not failed_parts(session)
    told = [*session.findings(), *session.findings(resolved=True)]
    assert not [finding for finding in told if "no gradient reaches" in str(finding)]
    waits = session._parts.layers._late
    assert waits is not None
    assert waits._handles.keys() == {"experts.3.0", "experts.3.2"}
    session.close()
    assert not any(module._forward_hooks for module in model.experts[3].modules())


def test_a_layer_that_runs_in_no_recorded_pass_is_looked_for_less_and_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded: list[None] = []
    monkeypatch.setattr(
        "esper.grafting.layers.late_layers.LayerRecorder",
        lambda *args, **options: (recorded.append(None), LayerRecorder(*args, **options))[1],
    )

    class Spiteful(Routed):
        def forward(self, x: Tensor) -> Tensor:
            self.batches += 1
            is_watched = bool(self.experts[0][0]._forward_hooks)
            found: Tensor = self.head(self.experts[0 if self.batches < 3 or is_watched else 1](x))
            return found

    model = Spiteful()
    optimizer, session = attached(model)
    for _ in range(400):
        step(model, optimizer, session)

    assert 1 <= len(recorded) <= 9
    assert not failed_parts(session)


class Yielding(nn.Module):
    """Its forward is a generator: no layer has run when the call of the model returns."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        for layer in self.layers:
            x = layer(x).relu()
            yield x


def test_the_layers_of_a_generator_are_known() -> None:
    model = Yielding()
    optimizer, session = attached(model, "supervised")
    for _ in range(12):
        losses = [y.square().mean() for y in model(torch.ones(4, 8))]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss)

    assert [layer.in_shape for layer in session.layers] == [(4, 8), (4, 8)]
    assert session.frame() is not None
    assert session.undo(session.graft("layers.1", "proj_lora_64")).exact


def all_errors(kind: type[EsperError] = EsperError) -> Iterator[type[EsperError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from all_errors(below)


def test_errors_come_back_from_the_processes_of_a_pool() -> None:
    # A pool of multiprocessing waits forever for an error that cannot be unpickled.
    for kind in all_errors():
        error = kind.__new__(kind, "the message")
        vars(error).update(layer="fc1", reason="why")
        for back in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301
            assert type(back) is kind
            assert (back.args, vars(back)) == (error.args, vars(error))
