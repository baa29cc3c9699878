"""D3: observing leaves the model as it was; ``detach()`` takes out all that holds no graft."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import Session


class Tied(nn.Module):
    """Two names of one tensor, an embedding, a module that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x.abs().mul(5).long().clamp(0, 10)[:, :4])
        h = self.norm(h + self.mix(h))
        h = self.norm(h + self.mix(h))
        y: Tensor = self.head(h).mean(1)
        return y


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 8, batch_first=True)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.gru(x.unflatten(1, (4, 4)))
        y: Tensor = self.out(steps[:, -1])
        return y


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 8),
    )


def normed() -> nn.Module:
    plain = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8))
    nn.utils.parametrizations.weight_norm(plain[0])  # type: ignore[no-untyped-call]
    return plain


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "convolutions": convolutions,
    "tied": Tied,
    "recurrent": Recurrent,
    "weight norm": normed,
}


def attached(
    kind: str, steps: int = 12, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, Session]:
    torch.manual_seed(0)
    model = MODELS[kind]()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    session = esper.attach(model, optimizer, **options)
    train(model, optimizer, session, steps)
    return model, optimizer, session


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, session: Session | None, steps: int
) -> list[float]:
    data, losses = torch.Generator().manual_seed(5), []
    for _ in range(steps):
        loss = model(torch.randn(8, 16, generator=data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if session is not None:
            session.step(loss)
        losses.append(loss.item())
    return losses


def arm(session: Session) -> None:
    """The next forward pass is read by hooks, as now and then."""
    sampler = session._parts.surgery.sampler
    assert sampler is not None
    sampler._activations.arm()
    sampler._deep_now = True


def look_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that its user can see, without the values."""
    return {
        "modules": [(name, type(module).__name__) for name, module in model.named_modules()],
        "children": [len(list(module.children())) for module in model.modules()],
        "parameters": [name for name, _ in model.named_parameters()],
        "leaves": [p.is_leaf for p in model.parameters()],
        "buffers": [name for name, _ in model.named_buffers()],
        "keys": list(model.state_dict()),
        "text": repr(model),
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def hooks_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    own = [hook for m in model.modules() for kind in kinds for hook in getattr(m, kind).values()]
    steps = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return [*own, *(hook for registry in steps for hook in registry.values())]


@pytest.mark.cover(values=1)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("steps", [0, 1, 49])
def test_an_observed_model_looks_as_it_did(kind: str, steps: int) -> None:
    torch.manual_seed(0)
    expected = look_of(MODELS[kind]())
    model, _, session = attached(kind, steps)

    assert look_of(model) == expected
    session.close()
    assert look_of(model) == expected


@pytest.mark.cover(values=1)
@pytest.mark.parametrize("mode", ["observe", "supervised", "automatic"])
@pytest.mark.parametrize("end", ["detach", "close"])
@pytest.mark.parametrize("kind", MODELS)
def test_nothing_stays_after_the_end(kind: str, end: str, mode: str) -> None:
    torch.manual_seed(0)
    expected = look_of(MODELS[kind]())
    model, optimizer, session = attached(kind, 5, mode=mode)
    getattr(session, end)()

    assert look_of(model) == expected
    assert hooks_of(model, optimizer) == []
    session.close()


def scripted(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = torch.jit.script(model)(x)
    return y


def traced(model: nn.Module, x: Tensor) -> Tensor:
    kept = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), kept)
    kept.seek(0)
    y: Tensor = torch.jit.load(kept)(x)
    return y


def exported(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = torch.export.export(model, (x,)).module()(x)
    return y


def exported_strictly(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = torch.export.export(model, (x,), strict=True).module()(x)
    return y


def compiled_whole(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = torch.compile(model, fullgraph=True, backend="eager")(x)
    return y


def symbolic(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = torch.fx.symbolic_trace(model)(x)
    return y


def pickled(model: nn.Module, x: Tensor) -> Tensor:
    kept = io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    y: Tensor = torch.load(kept, weights_only=False)(x)
    return y


def copied(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = copy.deepcopy(model)(x)
    return y


USES = {
    use.__name__: use
    for use in (
        scripted, traced, exported, exported_strictly, compiled_whole, symbolic, pickled, copied,
    )
}  # fmt: skip
IMPOSSIBLE = {  # without Esper too
    ("scripted", "weight norm"),
    ("pickled", "weight norm"),
    ("compiled_whole", "recurrent"),
    ("exported_strictly", "recurrent"),
}


@pytest.mark.cover(values=2)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("when", ["attached", "detached", "closed", "supervised, detached"])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_trained_model_can_be_used_as_any_other(kind: str, use: str, when: str) -> None:
    if (use, kind) in IMPOSSIBLE:
        pytest.skip("torch cannot do this with the model by itself")
    mode = "supervised" if "supervised" in when else "observe"
    model, _, session = attached(kind, mode=mode)
    if when != "attached":
        (session.close if when == "closed" else session.detach)()
    model.eval()
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(9))
    expected = model(x)

    torch.testing.assert_close(USES[use](model, x), expected)
    session.close()


def test_a_saved_model_loads_where_esper_is_not_installed(tmp_path: Path) -> None:
    moments = ("before the first step", "attached", "armed", "detached")
    for when in moments:
        model, _, session = attached("mlp", 0 if when == "before the first step" else 12)
        if when == "armed":
            arm(session)
            assert any(module._forward_hooks for module in model.modules())
        if when == "detached":
            session.detach()
        torch.save(model, tmp_path / f"{when}.pt")
        session.close()
    program = (
        "import sys; sys.modules['esper'] = None; import torch\n"
        "for when in sys.argv[1:]:\n"
        "    model = torch.load(f'{when}.pt', weights_only=False)\n"
        "    print(when, model(torch.ones(1, 16)).shape, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *moments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    expected = [f"{when} torch.Size([1, 8])" for when in moments]
    assert done.stdout.splitlines() == expected, done.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("ended", [False, True], ids=["attached", "detached"])
def test_an_observed_model_can_be_quantised(ended: bool) -> None:
    model, _, session = attached("mlp")
    if ended:
        session.detach()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)

    assert quantised(torch.ones(2, 16)).shape == (2, 8)
    session.close()


@pytest.mark.parametrize("armed", [False, True])
def test_gradients_of_each_sample_can_be_computed_while_attached(armed: bool) -> None:
    model, optimizer, session = attached("mlp")
    if armed:
        arm(session)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(model, weights, (x[None],))
        return y.square().mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, torch.ones(5, 16))

    assert each["0.weight"].shape == (5, 32, 16)
    train(model, optimizer, session, 10)
    assert not session.findings()
    session.close()


def test_training_goes_on_after_a_detach_and_a_graft_can_still_come() -> None:
    model, optimizer, session = attached("mlp")
    session.detach()
    frame = session.frame()
    train(model, optimizer, session, 260)

    assert session.frame() is frame
    assert not session.findings()
    receipt = session.graft("0", "mlp_gelu_2048")
    session.detach()
    assert receipt.present
    assert [name for name, _ in model.named_children()] == ["0", "1", "2"]
    session.undo(receipt, hard=False)
    session.close()
    assert not any(name.endswith("esper") for name, _ in model.named_modules())


def test_a_detach_before_the_first_step_measures_nothing() -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    session = esper.attach(model, optimizer)
    session.detach()
    session.detach()
    train(model, optimizer, session, 30)

    assert hooks_of(model, optimizer) == []
    assert session.frame() is None
    session.close()


def test_a_close_without_detach_keeps_the_empty_slots_of_compiled_code() -> None:
    model = MODELS["mlp"]()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    session = esper.attach(model, optimizer, mode="supervised")
    model.compile(backend="eager")
    train(model, optimizer, session, 3)
    session.close(detach=False)

    assert "0.esper" in dict(model.named_modules())


@pytest.mark.parametrize("mode", ["supervised", "automatic"])
def test_eager_layers_have_a_slot_only_while_they_hold_a_graft(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one costs some microseconds at each call of its layer."""
    monkeypatch.setattr("esper.sdk.surgery.idle_slots.anything_was_compiled", lambda: False)
    model, optimizer, session = attached("mlp", mode=mode)
    assert [n for n, _ in model.named_modules() if "esper" in n] == []
    assert not any(module._forward_hooks for module in model.modules())

    receipt = session.graft("0", "mlp_gelu_2048")
    train(model, optimizer, session, 3)
    assert [n for n, _ in model.named_modules() if n.endswith("esper")] == ["0.esper"]
    assert session.undo(receipt).exact
    train(model, optimizer, session, 3)
    assert [n for n, _ in model.named_modules() if "esper" in n] == []
    assert session.findings() == []


def test_a_graft_in_observe_makes_its_own_slot_only() -> None:
    model, _, session = attached("mlp")
    receipt = session.graft("0", "mlp_gelu_2048")

    assert [n for n, _ in model.named_modules() if n.endswith("esper")] == ["0.esper"]
    session.close()
    assert receipt.present
    assert "0.esper" in dict(model.named_modules())


@pytest.mark.parametrize("end", ["detach", "close"])
def test_nothing_stays_where_the_script_has_replaced_a_grafted_layer(end: str) -> None:
    model, optimizer, session = attached("mlp")
    session.graft("0", "proj_lora_64")
    model[0] = nn.Linear(16, 32)  # type: ignore[operator]
    optimizer.add_param_group({"params": list(model[0].parameters())})  # type: ignore[index]
    train(model, optimizer, session, 5)
    getattr(session, end)()

    assert hooks_of(model, optimizer) == []
    assert not model._load_state_dict_pre_hooks
    session.close()


@pytest.mark.parametrize("kind", MODELS)
def test_observing_changes_no_loss(kind: str) -> None:
    found = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = MODELS[kind]()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        session = esper.attach(model, optimizer) if watched else None
        found.append(train(model, optimizer, session, 60))
        if session is not None:
            session.close()

    assert found[0] == found[1]
