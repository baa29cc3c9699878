"""D6: running averages that ``attach`` was not told of get the grafts; other copies do not."""

from __future__ import annotations

import copy
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import esper
from esper.exceptions import IncompatibleLayerError
from esper.grafting.found_copies import search
from esper.grafting.slot import slots
from tests.esper.contract_with_host.failed_parts import failed_parts
from tests.esper.contract_with_host.saved_models import (
    KEEPING,
    MODELS,
    Run,
    batch_of,
    computed,
    logits_of,
)

DECAY = 0.9


class ByHand:
    """As most scripts write it: a deep copy, and a loop over two lists of parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.module = self.copy_of(model)

    def copy_of(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        pairs = zip(self.module.parameters(), model.parameters(), strict=False)
        for mine, theirs in pairs:
            mine.mul_(DECAY).add_(theirs, alpha=1 - DECAY)


class ThroughData(ByHand):
    """As many target networks are moved; torch counts no writes to ``.data``."""

    def update_parameters(self, model: nn.Module) -> None:
        for mine, theirs in zip(self.module.parameters(), model.parameters(), strict=False):
            mine.data.copy_(DECAY * mine.data + (1 - DECAY) * theirs.data)


class Frozen(ByHand):
    def copy_of(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).requires_grad_(False)


class OverStates(ByHand):
    """As timm does: over the values of two states."""

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        mine, theirs = self.module.state_dict(), model.state_dict()
        for average, new in zip(mine.values(), theirs.values(), strict=False):
            average.copy_(DECAY * average + (1 - DECAY) * new)


def torchs(model: nn.Module) -> Any:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))


KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "AveragedModel": torchs,
    "deep copy": ByHand,
    "frozen deep copy": Frozen,
    "through .data": ThroughData,
    "over states": OverStates,
}


class Averaged(Run):
    """A run whose script keeps an average."""

    def __init__(self, kind: str, average: str, made: str) -> None:
        torch.manual_seed(0)
        self.kind, self.steps = kind, 0
        self.model = MODELS[kind]().train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.average = KINDS[average](self.model) if made == "before" else None
        self.session = esper.attach(self.model, self.optimizer)
        if self.average is None:
            self.average = KINDS[average](self.model)
        self.train(3)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            super().train(1)
            if self.average is not None:
                self.average.update_parameters(self.model)


def learned(model: nn.Module, optimizer: torch.optim.Optimizer, *, rows: int) -> torch.Tensor:
    """The loss of one step of training, with which the model has learned."""
    loss: torch.Tensor = model(torch.randn(rows, 8)).pow(2).mean()
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    return loss


@pytest.mark.cover(values=1)
@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("average", KINDS)
@pytest.mark.parametrize(
    ("kind", "layer", "slug"),
    [("mlp", "0", "mlp_gelu_2048"), ("mlp", "3", "proj_lora_64"), ("mlp", "1", "ln_rms"),
     ("lstm", "lstm", "expert_mlp_1d"), ("gpt2", "transformer.h.1.attn.c_attn", "proj_ia3")],
)  # fmt: skip
def test_an_average_carries_each_graft_and_loses_it_with_the_model(
    kind: str, layer: str, slug: str, average: str, made: str
) -> None:
    run = Averaged(kind, average, made)
    best, output = copy.deepcopy(run.model.state_dict()), computed(run.model, kind)
    receipt = run.session.graft(layer, slug)
    run.train(30)

    pairs = dict(run.average.module.named_parameters())
    assert list(pairs) == [name for name, _ in run.model.named_parameters()]
    with torch.no_grad():  # near the model: each tensor averages its own
        for name, parameter in run.model.named_parameters():
            assert pairs[name].shape == parameter.shape
            assert (pairs[name] - parameter).abs().max() < 0.2, name
    told = [f for f in run.session.findings() if "running average" in f.observed]
    assert len(told) == 1
    run.model.load_state_dict(best)
    assert torch.equal(computed(run.model, kind), output)
    run.train(3)
    assert not receipt.present
    assert not [layer for layer, _, slot in slots(run.average.module) if slot.grafts()]
    run.session.close()


def test_other_copies_stay_as_they_are() -> None:
    run = Run("mlp")
    best = copy.deepcopy(run.model)
    teacher = copy.deepcopy(run.model).eval().requires_grad_(False)
    other = MODELS["mlp"]()
    other_optimizer = torch.optim.AdamW(other.parameters())
    names = [list(module.state_dict()) for module in (best, teacher, other)]
    outputs = [computed(module, "mlp") for module in (best, teacher)]
    for seed in range(3):
        logits_of(other, batch_of("mlp", seed)).square().mean().backward()
        other_optimizer.step()
        other_optimizer.zero_grad()
    run.graft("0", "mlp_gelu_2048")
    run.train(3)

    assert [list(module.state_dict()) for module in (best, teacher, other)] == names
    assert all(map(torch.equal, outputs, [computed(m, "mlp") for m in (best, teacher)]))
    assert not [f for f in run.session.findings() if "running average" in f.observed]
    run.session.close()


@pytest.mark.parametrize("average", ["AveragedModel", "deep copy"])
def test_an_average_of_another_model_of_the_same_class_stays_with_it(average: str) -> None:
    """As the two critics of soft actor-critic, each with its target."""
    run = Averaged("mlp", average, "before")
    torch.manual_seed(5)
    other = MODELS["mlp"]()
    optimizer = torch.optim.AdamW(other.parameters(), 1e-2)
    target = KINDS[average](other)
    run.session.close()
    run.session = esper.attach(run.model, run.optimizer)
    run.train(2)
    for seed in range(3):
        logits_of(other, batch_of("mlp", seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        target.update_parameters(other)
    run.graft("0", "mlp_gelu_2048")

    assert not any(True for _ in slots(target.module))
    assert any(True for _ in slots(run.average.module))
    target.update_parameters(other)
    run.train(2)
    run.session.close()


def test_models_that_are_trained_later_stay_as_they_are() -> None:
    """As the members of an ensemble, which are made at once and trained one after the other."""
    torch.manual_seed(3)
    model, later = (MODELS["mlp"]() for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    session = esper.attach(model, optimizer, verbose=False)
    for seed in range(3):
        logits_of(model, batch_of("mlp", seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step()
    session.graft("0", "mlp_gelu_2048")

    assert not any(True for _ in slots(later))
    assert not [f for f in session.findings() if "running average" in f.observed]
    session.close()


@pytest.mark.parametrize("made", ["before", "after"])
def test_a_target_network_loads_the_model_after_its_first_graft(made: str) -> None:
    """As in Q-learning, which loads it every thousand steps: nothing has written to it before."""
    model = MODELS["mlp"]()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    target = copy.deepcopy(model).eval()
    session = esper.attach(model, optimizer, verbose=False)
    target = target if made == "before" else copy.deepcopy(model).eval()

    def train() -> None:
        logits_of(model, batch_of("mlp", 0)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step()

    for _ in range(3):
        train()
    receipt = session.graft("0", "mlp_gelu_2048")
    untouched = list(target.state_dict())
    assert not [name for name in untouched if "esper" in name]
    train()
    target.load_state_dict(model.state_dict())
    assert torch.equal(computed(target, "mlp"), computed(model, "mlp"))

    session.undo(receipt)
    target.load_state_dict(model.state_dict())
    assert list(target.state_dict()) == untouched
    assert torch.equal(computed(target, "mlp"), computed(model, "mlp"))
    session.close()


def test_an_earlier_model_keeps_no_hook_of_a_later_session() -> None:
    earlier = OnlyHere(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model = OnlyHere(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with esper.attach(model, torch.optim.SGD(model.parameters(), 0.1), verbose=False) as session:
        model(torch.ones(2, 4))
        session.undo(session.graft("0", "proj_lora_64"))
    for one in (earlier, model):
        assert not one._load_state_dict_pre_hooks
        assert not one._load_state_dict_post_hooks


def half_built() -> nn.Module:
    """As the collector leaves a model that it takes apart, or another thread that copies one."""
    return nn.Sequential.__new__(nn.Sequential)


@pytest.mark.parametrize("made", ["a model", "a part", "inside", "an average", "a wrapper"])
def test_a_model_that_another_thread_just_builds_is_in_nobodys_way(made: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8)))
    whole = nn.Sequential(nn.Linear(8, 8))
    unfinished: Any = {
        "a model": half_built,
        "a part": lambda: nn.Linear.__new__(nn.Linear),
        "inside": lambda: whole.append(half_built()),
        "an average": lambda: AveragedModel.__new__(AveragedModel),
        "a wrapper": lambda: OptimizedModule.__new__(OptimizedModule),
    }[made]()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    session = esper.attach(model, optimizer)
    session.step(learned(model, optimizer, rows=4))
    assert session.graft("0", "proj_lora_64")
    del unfinished


def test_a_copy_on_the_meta_device_is_in_nobodys_way() -> None:
    model = OnlyHere(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    shapes = copy.deepcopy(model).to("meta")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with esper.attach(model, optimizer, verbose=False) as session:
        session.step(model(torch.ones(2, 4)).sum())
        session.graft("0", "proj_lora_64")
    assert shapes[0].weight.is_meta


def test_a_member_of_a_population_takes_over_the_weights_of_a_better_one() -> None:
    """Both train; the one that Esper does not know of loads the other's state after a graft."""
    pairs = [(model := MODELS["mlp"](), torch.optim.Adam(model.parameters())) for _ in range(2)]
    (better, optimizer), (worse, other) = pairs
    session = esper.attach(better, optimizer, verbose=False)

    def train() -> None:
        for model, its in pairs:
            logits_of(model, batch_of("mlp", 0)).square().mean().backward()
            its.step()
            its.zero_grad()
        session.step()

    train()
    train()
    session.graft("0", "mlp_gelu_2048")
    train()
    worse.load_state_dict(better.state_dict())
    assert torch.equal(computed(worse, "mlp"), computed(better, "mlp"))
    other.load_state_dict(optimizer.state_dict())
    train()
    session.close()


def test_a_dropped_average_is_not_kept_alive() -> None:
    run = Averaged("mlp", "AveragedModel", "before")
    receipt = run.graft("0", "proj_lora_64")
    assert len(run.session._parts.surgery.copies) == 1
    receipt.forget_snapshot()  # a hard undo would restore the average too
    run.average = None
    run.graft("3", "proj_lora_64")

    assert len(run.session._parts.surgery.copies) == 0
    run.session.close()


class OnlyHere(nn.Sequential):
    pass


def an_earlier_run(*, forgets_gradients: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = OnlyHere(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    with esper.attach(model, optimizer, verbose=False) as session:
        loss = model(torch.ones(2, 4)).square().mean()
        torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss)
    if forgets_gradients:
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("earlier", [None, "trained", "trained, without gradients"])
def test_a_graft_without_a_possible_average_collects_no_garbage(
    earlier: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection looks at every object of the process, and the training waits for it."""
    kept = earlier and an_earlier_run(forgets_gradients="without" in earlier)
    model = OnlyHere(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    collected: list[str] = []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with esper.attach(model, optimizer, verbose=False) as session:
        model(torch.ones(2, 4))
        monkeypatch.setattr("gc.collect", lambda: collected.append("once"))
        session.graft("0", "proj_lora_64")
        assert not collected
    del kept


class ByName:
    """An average as many tutorials write it; the script's own assertion ends a run."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            assert name in self.shadow
            self.shadow[name] = DECAY * self.shadow[name] + (1 - DECAY) * p


class WholeState:
    """With the buffers, written in place."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = copy.deepcopy(model.state_dict())

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        for name, value in model.state_dict().items():
            self.shadow[name].copy_(DECAY * self.shadow[name] + (1 - DECAY) * value)


class InOrder:
    """As torch_ema: a list, updated in place."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        for mine, theirs in zip(self.shadow, model.parameters(), strict=True):
            mine.sub_((1 - DECAY) * (mine - theirs))


class Anchor(InOrder):
    """The list of a penalty, which does not change."""

    def update_parameters(self, model: nn.Module) -> None:
        pairs = zip(self.shadow, model.parameters(), strict=True)
        assert all(anchor.shape == p.shape for anchor, p in pairs)


class AnchorsByName:
    """As L2-SP and EWC: a dict that does not change."""

    def __init__(self, model: nn.Module) -> None:
        self.anchors = {name: p.detach().clone() for name, p in model.named_parameters()}

    def update_parameters(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            assert self.anchors[name].shape == p.shape


class Masks(AnchorsByName):
    """As pruning, of another dtype than the parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.anchors = {name: p > 0 for name, p in model.named_parameters()}


class Importances(AnchorsByName):
    """As the Fisher information, in a class of dicts that torch uses for states."""

    def __init__(self, model: nn.Module) -> None:
        self.anchors = OrderedDict(
            (name, torch.zeros_like(p)) for name, p in model.named_parameters()
        )


class MatrixMasks(AnchorsByName):
    """As lottery tickets: the matrices alone."""

    def __init__(self, model: nn.Module) -> None:
        self.anchors = {name: p > 0 for name, p in model.named_parameters() if p.ndim > 1}

    def update_parameters(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            assert p.ndim == 1 or self.anchors[name].shape == p.shape


UNCHANGED: list[type[Any]] = [Anchor, AnchorsByName, Masks, Importances, MatrixMasks]


def run_beside(
    kept: Callable[[nn.Module], Any], mode: Literal["observe", "supervised"] = "supervised"
) -> tuple[esper.Session, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    beside = kept(model)
    session = esper.attach(model, optimizer, run="hand", mode=mode, verbose=False)

    def train() -> None:
        for _ in range(4):
            loss = learned(model, optimizer, rows=16)
            if hasattr(beside, "update_parameters"):
                beside.update_parameters(model)
            session.step(loss)

    train()
    return session, train if hasattr(beside, "update_parameters") else beside


@pytest.mark.parametrize("kind", [ByName, WholeState, InOrder, *UNCHANGED])
def test_tensors_that_a_script_pairs_by_hand_stay_pairs(kind: type[Any]) -> None:
    session, train = run_beside(kind)

    surgery = session._parts.surgery
    with pytest.raises(IncompatibleLayerError, match=r"by hand|in the order of|by the names of"):
        surgery.apply(surgery.planned("0", "proj_lora_64", "", {}))
    if kind not in UNCHANGED:
        with pytest.raises(IncompatibleLayerError, match="keeps an average by hand"):
            session.graft("0", "proj_lora_64")
    train()


class Rates:
    """Of each parameter, in a dict of plain numbers, which the garbage collector does not know."""

    def __init__(self, model: nn.Module) -> None:
        self.rates = {name: 0.9**at for at, (name, _) in enumerate(model.named_parameters())}

    def update_parameters(self, model: nn.Module) -> None:
        assert all(self.rates[name] for name, _ in model.named_parameters())


class RatesOfClass(Rates):
    """In a configuration that is a class."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.rates = type("Configuration", (), vars(self)).rates  # type: ignore[attr-defined]


class Histories(Rates):
    def __init__(self, model: nn.Module) -> None:
        self.rates = {name: [0.1] for name, _ in model.named_parameters()}  # type: ignore[misc]


class InBuffers(nn.Module):
    """As LitEma of the diffusion models: names without dots, in a module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(DECAY))
        for name, p in model.named_parameters():
            self.register_buffer(name.replace(".", ""), p.detach().clone())

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            getattr(self, name.replace(".", "")).lerp_(p, 1 - DECAY)


class Stacked:
    """Members of an ensemble, stacked anew in each step."""

    def __init__(self, model: nn.Module) -> None:
        self.members = [model, copy.deepcopy(model)]
        self.update_parameters(model)

    def update_parameters(self, model: nn.Module) -> None:
        self.stacked = torch.func.stack_module_state(self.members)


class ParametersOfCopy:
    """A dict of the parameters of an average that gets each graft, made once."""

    def __init__(self, model: nn.Module) -> None:
        self.average = copy.deepcopy(model)
        self.parameters = dict(self.average.named_parameters())

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            self.parameters[name].lerp_(p, 1 - DECAY)


@pytest.mark.parametrize("mode", ["observe", "supervised"])
@pytest.mark.parametrize(
    "kind", [Rates, RatesOfClass, Histories, InBuffers, Stacked, ParametersOfCopy]
)
def test_what_a_script_looks_up_by_names_is_refused_to_itself_too(
    kind: type[Any], mode: Literal["observe", "supervised"]
) -> None:
    session, train = run_beside(kind, mode)

    with pytest.raises(
        IncompatibleLayerError, match=r"names of a graft in it|would have none|find those of"
    ):
        session.graft("0", "proj_lora_64")
    train()


class Norms:
    """What is logged in each step is made anew in the next."""

    def __init__(self, model: nn.Module) -> None:
        self.update_parameters(model)

    def update_parameters(self, model: nn.Module) -> None:
        self.norms = {name: p.norm().item() for name, p in model.named_parameters()}


def test_what_a_script_logs_by_names_is_in_nobodys_way() -> None:
    session, train = run_beside(Norms)

    surgery = session._parts.surgery
    surgery.apply(surgery.planned("0", "proj_lora_64", "", {}))
    train()
    session.graft("3", "proj_lora_64")
    train()


class Records(Norms):
    """What is logged is kept, in a list."""

    def __init__(self, model: nn.Module) -> None:
        self.records: list[dict[str, float]] = []
        self.update_parameters(model)

    def update_parameters(self, model: nn.Module) -> None:
        super().update_parameters(model)
        self.records.append(self.norms)
        del self.norms


def test_records_by_names_are_in_nobodys_way() -> None:
    session, train = run_beside(Records)

    session.graft("0", "proj_lora_64")
    train()


@pytest.mark.parametrize("kind", [Rates, Histories])
def test_what_is_looked_up_by_names_may_be_made_after_the_first_steps(kind: type[Rates]) -> None:
    session, train = run_beside(Norms)
    model = session._parts.setup.model
    beside = kind(model)

    with pytest.raises(IncompatibleLayerError, match="names of a graft in it"):
        session.graft("0", "proj_lora_64")
    train()
    beside.update_parameters(model)


def test_what_is_logged_after_the_step_is_in_nobodys_way() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with esper.attach(model, optimizer, verbose=False) as session:
        for step in range(6):
            session.step(learned(model, optimizer, rows=16))
            norms = {name: p.norm().item() for name, p in model.named_parameters()}
            if step == 3:
                session.graft("0", "proj_lora_64")
    assert len(norms) > len(list(model.parameters())) - 6


class _Nameless(type):
    @property
    def __module__(cls) -> str:  # type: ignore[override]
        raise RuntimeError("the script's own")


class _Unhashable:
    broken = False

    def __hash__(self) -> int:
        if self.broken:
            raise RuntimeError("the script's own")
        return 1


def test_variables_that_answer_with_errors_end_neither_a_step_nor_a_graft(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    key = _Unhashable()
    kept = [_Nameless("Nameless", (), {})(), {key: 1.0}]
    key.broken = True
    with esper.attach(model, optimizer, server="") as session:
        for _ in range(3):
            loss = model(torch.randn(3, 4)).square().mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            session.step(loss)
        session.graft("0", "proj_lora_64")
    assert len(kept) == 2
    assert "What it looks up by name is not known" in caplog.text


def test_a_look_at_the_variables_of_a_script_keeps_none_of_them() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    data = torch.ones(2, 4)
    freed = weakref.ref(data)
    session = esper.attach(model, torch.optim.SGD(model.parameters(), 0.1), verbose=False)
    session.close()
    del data
    assert freed() is None


@pytest.mark.parametrize("kind", [WholeState, InOrder])
def test_in_observe_too_where_the_tensors_are_written_in_place(kind: type[Any]) -> None:
    session, train = run_beside(kind, "observe")

    with pytest.raises(IncompatibleLayerError, match="keeps an average by hand"):
        session.graft("0", "proj_lora_64")
    train()


class NamedInModel(AnchorsByName):
    """Of the encoder alone, by the names that its parameters have in the model."""

    def __init__(self, model: nn.Module) -> None:
        self.anchors = {f"encoder.{n}": p.detach().clone() for n, p in model.named_parameters()}

    def update_parameters(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            assert self.anchors[f"encoder.{name}"].shape == p.shape


class OfPart:
    """The tensors of the encoder alone; the head has no average."""

    def __init__(self, kept: type[Any], model: nn.Module) -> None:
        self.kept = kept(model.get_submodule("encoder"))

    def update_parameters(self, model: nn.Module) -> None:
        self.kept.update_parameters(model.get_submodule("encoder"))


@pytest.mark.parametrize("kind", [ByName, WholeState, InOrder, NamedInModel, *UNCHANGED])
def test_tensors_of_a_part_keep_grafts_out_of_this_part_alone(kind: type[Any]) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8))
    model = nn.Sequential()
    model.add_module("encoder", encoder)
    model.add_module("head", nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    beside = OfPart(kind, model)
    session = esper.attach(model, optimizer, run="part", mode="supervised", verbose=False)

    def train() -> None:
        for _ in range(4):
            loss = learned(model, optimizer, rows=16)
            beside.update_parameters(model)
            session.step(loss)

    train()
    surgery = session._parts.surgery
    with pytest.raises(IncompatibleLayerError, match=r"the 'encoder' part's parameters"):
        surgery.apply(surgery.planned("encoder.0", "proj_lora_64", "", {}))
    if kind not in (NamedInModel, *UNCHANGED):
        with pytest.raises(IncompatibleLayerError, match="keeps an average by hand"):
            session.graft("encoder.3", "proj_lora_64")
    session.graft("head.0", "proj_lora_64")
    train()
    assert not failed_parts(session)


@pytest.mark.parametrize("keep", KEEPING.values(), ids=KEEPING.keys())
def test_a_state_that_was_copied_or_read_from_a_file_is_in_nobodys_way(
    keep: Callable[[Any, Path], Any], tmp_path: Path
) -> None:
    session, state = run_beside(lambda model: keep(model.state_dict(), tmp_path), "observe")

    session.graft("0", "proj_lora_64")
    session._parts.setup.model.load_state_dict(state)


def test_a_state_that_is_only_kept_is_in_nobodys_way() -> None:
    def saved(model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in model.state_dict().items()}

    session, state = run_beside(saved)

    surgery = session._parts.surgery
    assert surgery.apply(surgery.planned("0", "proj_lora_64", "", {})).receipt is not None
    session._parts.setup.model.load_state_dict(state)


@pytest.mark.parametrize("of", ["Esper", "torch"])
def test_a_state_of_an_optimizer_by_names_is_in_nobodys_way(of: str) -> None:
    """As in a checkpoint that the script has saved, and holds still."""
    model = without_buffers()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session = esper.attach(model, optimizer, server="", verbose=False)
    for _ in range(2):
        session.step(learned(model, optimizer, rows=4))
    kept = session.state_dict() if of == "Esper" else get_optimizer_state_dict(model, optimizer)
    session.step(learned(model, optimizer, rows=4))
    assert session.graft("0", "proj_lora_64")
    assert kept


def without_buffers() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def trained_beside(
    kept: Callable[[nn.Module], Any],
    *,
    attaches: bool,
    replaces: bool = False,
    made_at: int = -1,
    grafted_at: int = 4,
) -> tuple[nn.Module, esper.Session | None]:
    """A script that keeps what ``kept`` makes, in automatic mode, where a graft is decided."""
    torch.manual_seed(0)
    model = without_buffers()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    beside = kept(model) if made_at < 0 else None
    session = None
    if attaches:
        session = esper.attach(model, optimizer, mode="automatic", server="", verbose=False)
    for step in range(120):
        if step == made_at:
            beside = kept(model)
        loss = learned(model, optimizer, rows=16)
        if hasattr(beside, "update_parameters"):
            beside.update_parameters(model)
        if replaces and step == 2:
            beside = kept(model)
        if session is not None:
            session.step(loss)
            local = session._parts.local
            assert local is not None
            if step == grafted_at:
                local._graft(session._parts.surgery.planned("0", "proj_lora_64", "", {}))
            elif local._coming is not None:  # as at the next health frame
                local._graft(local._coming)
    return model, session


@pytest.mark.parametrize("kind", UNCHANGED)
def test_automatic_mode_ends_a_run_with_such_pairs_as_if_it_were_not_there(
    kind: type[Any],
) -> None:
    alone, _ = trained_beside(kind, attaches=False)
    model, session = trained_beside(kind, attaches=True)

    assert all(map(torch.equal, alone.parameters(), model.parameters()))
    assert session is not None
    assert not failed_parts(session)


@pytest.fixture
def time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a long run: a search is a small part of its time."""
    time = search.SearchTime()
    time._spent = -math.inf
    monkeypatch.setattr(search, "search_time", time)


@pytest.mark.usefixtures("time_is_left")
@pytest.mark.parametrize("kind", [*UNCHANGED, ByName, InOrder])
def test_so_it_does_where_the_pairs_are_made_late(kind: type[Any]) -> None:
    """As EWC, once the first task is learned."""
    alone, _ = trained_beside(kind, attaches=False, made_at=10)
    model, session = trained_beside(kind, attaches=True, made_at=10, grafted_at=12)

    assert all(map(torch.equal, alone.parameters(), model.parameters()))
    assert session is not None
    assert not failed_parts(session)


def named_copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.usefixtures("time_is_left")
def test_a_best_state_that_was_replaced_is_known_as_one() -> None:
    """The newer one is found before the graft, and is no anchor either."""
    model, session = trained_beside(named_copies, attaches=True, replaces=True, grafted_at=12)

    assert session is not None
    assert any(slot.grafts() for _, _, slot in slots(model))


@pytest.mark.parametrize(
    ("kept", "replaces"),
    [(lambda model: copy.deepcopy(model.state_dict()), False), (named_copies, True)],
)
def test_automatic_mode_grafts_beside_what_is_known_to_be_a_saved_state(
    kept: Callable[[nn.Module], Any], replaces: bool
) -> None:
    model, session = trained_beside(kept, attaches=True, replaces=replaces)

    assert session is not None
    assert not failed_parts(session)
    assert any(slot.grafts() for _, _, slot in slots(model))


def test_what_may_be_a_saved_state_or_an_anchor_keeps_the_policy_out_in_words() -> None:
    kept: list[dict[str, torch.Tensor]] = []
    _, session = trained_beside(lambda model: kept.append(named_copies(model)), attaches=True)

    assert session is not None
    surgery = session._parts.surgery
    with pytest.raises(IncompatibleLayerError, match=r"copy\.deepcopy\(model\.state_dict\(\)\)"):
        surgery.apply(surgery.planned("0", "proj_lora_64", "", {}))
    receipt = session.graft("0", "proj_lora_64")
    session.undo(receipt)
    kept.clear()
    assert surgery.apply(surgery.planned("0", "proj_lora_64", "", {})).receipt is not None


class Part(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))


class WithMomentumEncoder(nn.Module):
    """As MoCo and BYOL: the copy is in the model, and its forward pass writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.online = Part()
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for mine, theirs in zip(self.target.parameters(), self.online.parameters(), strict=True):
            mine.data = DECAY * mine.data + (1 - DECAY) * theirs.data
        x = self.stem(x)
        found: torch.Tensor = self.head(self.online(x)) - self.target(x)
        return found


class WithHeldTarget(nn.Module):
    """The target is only detached, so the optimizer holds it with ``model.parameters()``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.online = Part()
        self.target = copy.deepcopy(self.online)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        with torch.no_grad():
            target = self.target(x)
            pairs = zip(self.target.parameters(), self.online.parameters(), strict=True)
            for mine, theirs in pairs:
                mine.lerp_(theirs, 1 - DECAY)
        found: torch.Tensor = self.head(self.online(x)) - target
        return found


class WithTargetBeside(nn.Module):
    """As soft actor-critic: the copy is beside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.online = Part()
        self.beside = [copy.deepcopy(self.online)]  # a list hides it from the model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            pairs = zip(self.beside[0].parameters(), self.online.parameters(), strict=True)
            for mine, theirs in pairs:
                mine.lerp_(theirs, 1 - DECAY)
        found: torch.Tensor = self.head(self.online(self.stem(x)))
        return found


class Stack(nn.Module):
    """As torch's TransformerEncoder, whose layers start as copies; the lower one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        lower = Part().requires_grad_(False)
        self.parts = nn.ModuleList([lower, copy.deepcopy(lower).requires_grad_()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for part in self.parts:
            x = x + part(x)
        found: torch.Tensor = self.head(x)
        return found


class WithSpare(nn.Module):
    """As PEFT's modules_to_save: the old layer is kept, and does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.old = Part().requires_grad_(False)
        self.new = copy.deepcopy(self.old).requires_grad_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.new(x)
        return found


class SlowTeacher(nn.Module):
    """The student learns much faster than its average follows, and leaves it far behind."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        with torch.no_grad():
            taught = self.teacher(x)
            for mine, theirs in zip(
                self.teacher.parameters(), self.student.parameters(), strict=True
            ):
                mine.lerp_(theirs, 0.001)
        self.student[0].weight.data += 0.5  # as a fast optimizer's steps
        return self.head(self.student(x) - taught)


@pytest.mark.parametrize("clears", ["before backward", "before session.step"])
@pytest.mark.parametrize(
    ("kind", "refused", "grafted"),
    [
        (WithSpare, (), "new.0"),
        (WithMomentumEncoder, ("online.0", "target.2"), "head"),
        (WithHeldTarget, ("online.0", "target.2"), "head"),
        (WithTargetBeside, ("online.2",), "stem"),
        (SlowTeacher, ("student.0", "teacher.2"), "head"),
        (Stack, (), "parts.1.0"),
    ],
)
def test_a_part_that_the_script_averages_takes_no_graft(
    kind: type[nn.Module], refused: tuple[str, ...], grafted: str, clears: str
) -> None:
    torch.manual_seed(0)
    model = kind()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    session = esper.attach(model, optimizer, run="part", mode="supervised", verbose=False)

    def train() -> None:
        for _ in range(3):
            loss = learned(model, optimizer, rows=4)
            if clears == "before session.step":
                optimizer.zero_grad()
            session.step(loss)

    train()
    while kind is WithHeldTarget and session.frame() is None:
        train()  # a cleared gradient is known from the health frames
    for layer in refused:
        with pytest.raises(IncompatibleLayerError, match="as an average or a target"):
            session.graft(layer, "proj_lora_64")
    receipt = session.graft(grafted, "mlp_gelu_2048")
    train()
    assert session.undo(receipt).exact
    train()


class Towers(nn.Module):
    """Both train, from the same weights, and a penalty compares their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.right = copy.deepcopy(self.left)
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pairs = zip(self.left.parameters(), self.right.parameters(), strict=True)
        penalty = torch.stack([(mine - theirs).pow(2).sum() for mine, theirs in pairs]).sum()
        found: torch.Tensor = self.head(self.left(x) + self.right(x.flip(0))) + penalty
        return found


class SingleLayers(nn.Module):
    """As the projections of attention: layers of one shape that start alike are no towers."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(8, 8)
        self.right = copy.deepcopy(self.left)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.right(self.left(x).relu())
        return found


class OtherTowers(Towers):
    """Of one shape, but of other weights, as the two encoders of a search."""

    def __init__(self) -> None:
        super().__init__()
        self.right = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.left(x) + self.right(x.flip(0)))
        return found


@pytest.mark.parametrize(
    ("kind", "refused", "grafted"),
    [
        (Towers, ("left.0", "right.2"), ("head",)),
        (SingleLayers, (), ("left", "right")),
        (OtherTowers, (), ("left.0", "right.2")),
    ],
)
def test_the_policy_grafts_into_neither_of_two_towers_that_train_as_copies(
    kind: type[nn.Module], refused: tuple[str, ...], grafted: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    model = kind()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    session = esper.attach(model, optimizer, run="towers", mode="supervised", verbose=False)

    def train() -> None:
        for _ in range(3):
            loss = learned(model, optimizer, rows=4)
            session.step(loss)

    train()
    surgery = session._parts.surgery
    for layer in refused:
        with pytest.raises(IncompatibleLayerError, match="train from the same weights"):
            surgery.apply(surgery.planned(layer, "proj_lora_64", "", {}))
    for layer in grafted:
        surgery.apply(surgery.planned(layer, "proj_lora_64", "", {}))
    train()


def reference_by_copy(model: nn.Module, reference: nn.Module | None) -> nn.Module:
    return copy.deepcopy(model)


def reference_by_load(model: nn.Module, reference: nn.Module | None) -> nn.Module:
    reference = copy.deepcopy(model) if reference is None else reference
    reference.load_state_dict(model.state_dict())
    return reference


@pytest.mark.parametrize("made", [reference_by_copy, reference_by_load])
def test_the_policy_does_not_graft_beside_a_reference_with_gradients(
    made: Callable[[nn.Module, nn.Module | None], nn.Module],
) -> None:
    """As SVRG, which corrects each gradient by that of an older copy."""

    def trained(*, attaches: bool) -> nn.Module:
        torch.manual_seed(0)
        model = without_buffers()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        session = None
        if attaches:
            session = esper.attach(model, optimizer, mode="automatic", server="", verbose=False)
        reference: nn.Module | None = None
        for step in range(60):
            if step % 20 == 0:
                reference = made(model, reference)
            x = torch.randn(16, 8)
            assert reference is not None
            for each in (model, reference):
                each.zero_grad()
                torch.autograd.backward(each(x).pow(2).mean())
            for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
                assert mine.grad is not None
                assert theirs.grad is not None
                mine.grad -= 0.1 * theirs.grad
            optimizer.step()
            if session is not None:
                session.step()
                if step == 4 and (local := session._parts.local):
                    local._graft(session._parts.surgery.planned("0", "proj_lora_64", "", {}))
        if session is not None:
            surgery = session._parts.surgery
            with pytest.raises(IncompatibleLayerError, match="a copy of the model gets gradients"):
                surgery.apply(surgery.planned("0", "proj_lora_64", "", {}))
            assert not failed_parts(session)
        return model

    alone, model = trained(attaches=False), trained(attaches=True)
    assert all(map(torch.equal, alone.parameters(), model.parameters()))


def test_a_graft_without_a_run_comes_to_an_average_too() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = torchs(model)

    def train() -> None:
        for _ in range(2):
            learned(model, optimizer, rows=16)
            kept.update_parameters(model)

    train()
    receipts = [
        esper.graft(model, layer, "proj_lora_64", optimizer=optimizer) for layer in ("0", "2")
    ]
    train()
    assert [p.shape for p in kept.module.parameters()] == [p.shape for p in model.parameters()]
    for receipt in reversed(receipts):
        receipt.undo()
    assert kept.module.state_dict().keys() == model.state_dict().keys()
    train()


def test_a_graft_without_a_run_breaks_no_average_that_is_kept_by_hand() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = InOrder(model)
    learned(model, optimizer, rows=16)
    kept.update_parameters(model)

    with pytest.raises(IncompatibleLayerError, match="keeps an average by hand"):
        esper.graft(model, "0", "proj_lora_64", optimizer=optimizer)
