"""Scripts whose torch is set up in an unusual way are measured like others: no part fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor, nn

import esper
from esper.exceptions import IncompatibleLayerError
from tests.esper.contract_with_host.failed_parts import failed_parts

STEPS = 60


def script() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, session: Any, steps: int = STEPS
) -> None:
    for _ in range(steps):
        loss = model(torch.randn(16, 8, device="cpu")).pow(2).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss)


def logged_in_inference_mode() -> Any:
    model, optimizer = script()
    session = esper.attach(model, optimizer, run="kinds", verbose=False)
    for _ in range(STEPS):
        with torch.inference_mode():
            session.step(model(torch.randn(16, 8)).pow(2).mean())
    train(model, optimizer, session)
    return session


def another_default_device() -> Any:
    model, optimizer = script()
    with torch.device("meta"):
        session = esper.attach(model, optimizer, run="kinds", mode="supervised", verbose=False)
        train(model, optimizer, session)
        assert session.graft("2", "proj_lora_64").certificate.max_abs_diff == 0
        train(model, optimizer, session)
        session.state_dict()
    return session


def layers_replaced_while_it_trains() -> Any:
    model, optimizer = script()
    session = esper.attach(model, optimizer, run="kinds", verbose=False)
    train(model, optimizer, session, 25)
    model[2] = nn.Linear(16, 4)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    train(model, optimizer, session)
    del model[1]
    train(model, optimizer, session)
    return session


@pytest.mark.parametrize(
    "kind", [logged_in_inference_mode, another_default_device, layers_replaced_while_it_trains]
)
def test_every_part_goes_on(kind: Callable[[], Any]) -> None:
    session = kind()

    assert not failed_parts(session)
    assert session.frame() is not None
    assert not math.isnan(session.frame().metrics["loss"])


class LowRankAdapter(nn.Module):
    """As those of PEFT: the one factor is random, the other zero."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x) + self.up(self.down(x))
        return found


@pytest.mark.parametrize("mode", ["observe", "automatic"])
def test_adapters_that_begin_at_zero_are_no_alarm(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        LowRankAdapter(nn.Linear(8, 16)), nn.ReLU(), LowRankAdapter(nn.Linear(16, 4))
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    session = esper.attach(model, optimizer, run="adapters", mode=mode, verbose=False)
    train(model, optimizer, session, 30)

    found = [*session.findings(), *session.findings(resolved=True)]
    assert "update_ratio_high" not in {finding.slug for finding in found}
    assert session.remedies == ()


class SilentAtFirst(torch.optim.Optimizer):
    """An optimizer of somebody else, which warms up by itself."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.updates = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        share = min(1.0, max(0, self.updates - 4) / 20)
        self.updates += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * share * p.grad)


def rate_from_zero(params: Any) -> tuple[torch.optim.Optimizer, Any]:
    """As the schedules of transformers: the first update has a rate of zero."""
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, n / 20))


def silent_radam(params: Any) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = schedulefree.RAdamScheduleFree(params, lr=1e-2)
    optimizer.train()
    return optimizer, None


def own_warm_up(params: Any) -> tuple[torch.optim.Optimizer, Any]:
    return SilentAtFirst(params), None


def line_search(params: Any) -> tuple[torch.optim.Optimizer, Any]:
    return torch.optim.LBFGS(params, lr=1.0, max_iter=5, line_search_fn="strong_wolfe"), None


@pytest.mark.parametrize("make", [rate_from_zero, silent_radam, own_warm_up, line_search])
def test_an_optimizer_that_chooses_its_own_pace_is_no_alarm(make: Any) -> None:
    model, _ = script()
    optimizer, scheduler = make(model.parameters())
    session = esper.attach(model, optimizer, run="pace", mode="automatic", verbose=False)
    x, y = torch.randn(16, 8), torch.randn(16, 4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).pow(2).mean()
        torch.autograd.backward(loss)
        return loss

    for _ in range(30):
        loss = optimizer.step(closure) if make is line_search else closure()
        if make is not line_search:
            optimizer.step()
        if scheduler is not None:
            scheduler.step()  # from here on the rate is that of the next update
        session.step(loss)

    found = [*session.findings(), *session.findings(resolved=True)]
    assert {finding.slug for finding in found} & {"nothing_moves", "update_ratio_high"} == set()
    assert session.remedies == ()


def test_gradients_that_are_all_sparse_are_read_too() -> None:
    torch.manual_seed(0)
    model = nn.EmbeddingBag(20, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.01)
    session = esper.attach(model, optimizer, run="sparse", verbose=False)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for _ in range(2):
            loss = model(torch.randint(20, (8, 3))).pow(2).mean()
            torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss)

    assert "missing_telemetry" not in {finding.rule for finding in session.findings()}


def test_a_layer_that_was_first_seen_on_an_empty_batch_takes_a_graft() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    session = esper.attach(model, optimizer, run="empty", mode="supervised", verbose=False)
    for rows in (0, 0, 8, 8):
        loss = model(torch.randn(rows, 8)).pow(2).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss)

    x = torch.randn(8, 8)
    before = model(x)
    receipt = session.graft("2", "mlp_gelu_2048")
    assert torch.equal(model(x), before)
    assert session.undo(receipt).exact


@pytest.mark.parametrize("blueprint", ["mlp_gelu_2048", "proj_ia3"])
def test_a_graft_into_a_layer_that_the_script_has_widened_is_refused_in_a_sentence(
    blueprint: str,
) -> None:
    model, optimizer = script()
    with esper.attach(model, optimizer, verbose=False) as session:
        train(model, optimizer, session, steps=2)
        last = model[-1]
        assert isinstance(last, nn.Linear)
        width = last.out_features
        last.weight = nn.Parameter(torch.randn(width + 4, last.in_features))
        last.bias = nn.Parameter(torch.zeros(width + 4))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(IncompatibleLayerError, match=f"{width + 4} features.*{width}.*attach"):
            session.graft(str(len(model) - 1), blueprint)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_surgery_calls_no_hook_of_the_script() -> None:
    """A script counts, logs or masks in its hooks; a trial of a graft is none of its passes."""
    model, optimizer = script()
    called: list[str] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: called.append("before a forward pass"))
        module.register_forward_hook(lambda *_: called.append("after a forward pass"))
    for parameter in model.parameters():
        parameter.register_hook(lambda _: called.append("a gradient"))
        parameter.register_post_accumulate_grad_hook(lambda _: called.append("accumulated"))
    optimizer.register_step_pre_hook(lambda *_: called.append("before an update"))
    optimizer.register_step_post_hook(lambda *_: called.append("after an update"))
    session = esper.attach(model, optimizer, run="hooks", mode="supervised", verbose=False)
    train(model, optimizer, session, 3)
    kinds = set(called)

    called.clear()
    receipt = session.graft("2", "mlp_gelu_2048")
    session.undo(receipt)
    session.freeze("0")
    assert called == []

    train(model, optimizer, session, 1)
    assert set(called) == kinds, "they are all there again"


def test_an_overflow_that_a_scaler_skips_takes_no_graft_out() -> None:
    """A ``GradScaler`` begins too high, and makes no step until its scale fits."""
    model, optimizer = script()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    session = esper.attach(model, optimizer, run="scaler", mode="supervised", verbose=False)
    for step in range(12):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(torch.randn(16, 8)).pow(2).mean()
        optimizer.zero_grad()
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
        session.step(loss)
        if step == 3:
            receipt = session.graft("2", "mlp_gelu_2048")

    assert scaler.get_scale() < 2.0**112, "it has skipped steps with the graft"
    assert receipt.present


class AnswersAll:
    """As some wrappers: an attribute that the module lacks is None."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if self.__dict__.get("is_built"):
                return None
            raise  # torch asks before it registers a child or a parameter


class Answering(AnswersAll, nn.Sequential):
    pass


class AnsweringLinear(AnswersAll, nn.Linear):
    pass


@pytest.mark.parametrize("mode", ["observe", "supervised"])
def test_a_model_that_answers_every_attribute_is_watched_and_grafted(mode: str) -> None:
    model = Answering(nn.Linear(8, 16), nn.ReLU(), AnsweringLinear(16, 4))
    for module in model.modules():
        module.is_built = True
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    session = esper.attach(model, optimizer, run="answers", mode=mode, verbose=False)
    train(model, optimizer, session, 3)
    receipt = session.graft("0", "proj_lora_64")
    train(model, optimizer, session, 3)

    assert session.undo(receipt).exact
    assert not failed_parts(session)
    assert mode == "observe" or session.graft("2", "mon_act_stats").present
    esper.export(model)


def test_gradients_of_each_example_by_vmap_are_no_error() -> None:
    """A tensor of ``torch.func`` must not leave its transform."""
    model, optimizer = script()
    session = esper.attach(model, optimizer, run="vmap", verbose=False)

    def loss_of(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(model, weights, (x[None],)).pow(2).mean()
        return found

    each = torch.func.vmap(torch.func.grad_and_value(loss_of), (None, 0))
    for _ in range(6):
        weights = {name: p.detach() for name, p in model.named_parameters()}
        gradients, losses = each(weights, torch.randn(16, 8))
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].mean(0)
        optimizer.step()
        session.step(losses.mean())

    assert not failed_parts(session)


@pytest.mark.parametrize("mode", ["observe", "automatic"])
def test_a_script_that_frees_the_memory_of_its_weights_between_steps_goes_on(mode: Any) -> None:
    """As libraries that offload weights do; ``Tensor.numpy`` would fix the size of the memory."""
    model, optimizer = script()
    session = esper.attach(model, optimizer, run="offload", mode=mode, verbose=False)
    kept: dict[nn.Parameter, Tensor] = {}
    for step in range(20):
        for parameter, values in kept.items():
            parameter.untyped_storage().resize_(values.nbytes)
            parameter.data.copy_(values)
        train(model, optimizer, session, 1)
        if step == 9:
            receipt = session.graft("2", "proj_lora_64")
            assert receipt.digest_after
            session.undo(receipt)
        kept = {parameter: parameter.detach().clone() for parameter in model.parameters()}
        for parameter in kept:
            parameter.untyped_storage().resize_(0)
    assert not failed_parts(session)


@pytest.mark.parametrize("mode", ["observe", "automatic"])
def test_weights_whose_memory_is_freed_are_not_read(mode: Any) -> None:
    """To read them would end the process."""
    model, optimizer = script()
    with esper.attach(model, optimizer, run="away", mode=mode, verbose=False) as session:
        kept: dict[nn.Parameter, Tensor] = {}
        for _ in range(80):
            for parameter, values in kept.items():
                parameter.untyped_storage().resize_(values.nbytes)
                parameter.data.copy_(values)
            loss = model(torch.randn(16, 8)).pow(2).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            kept = {parameter: parameter.detach().clone() for parameter in model.parameters()}
            for parameter in kept:
                parameter.untyped_storage().resize_(0)
            session.step(loss)
        assert len([f for f in session.findings() if "memory of the weights" in str(f)]) == 1


class Refusing(nn.Sequential):
    """Tells its parameters until the training has begun."""

    begun = False

    def parameters(self, recurse: bool = True) -> Any:
        if self.begun:
            raise RuntimeError("not now")
        return super().parameters(recurse)


@pytest.mark.parametrize("mode", ["observe", "automatic"])
def test_a_model_that_stops_telling_its_parameters_trains_on(mode: Any) -> None:
    model = Refusing(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with esper.attach(model, optimizer, run="refusing", mode=mode, verbose=False) as session:
        for step in range(12):
            model.begun = step > 3
            loss = model(torch.randn(16, 8)).pow(2).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            session.step(loss)
        model.begun = False


def test_weights_on_a_device_that_shows_no_memory_are_as_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(_: Tensor) -> Any:
        raise NotImplementedError("Cannot access storage of OpaqueTensorImpl")

    model, optimizer = script()
    with esper.attach(model, optimizer, run="opaque", verbose=False) as session:
        loss = model(torch.randn(16, 8)).pow(2).mean()
        torch.autograd.backward(loss)
        optimizer.step()
        monkeypatch.setattr(Tensor, "untyped_storage", none)
        session.step(loss)
        monkeypatch.undo()
        assert "memory of the weights" not in str(session.findings())


@pytest.mark.parametrize("skipped", [{14}, {8, 14, 19}], ids=["once", "three times"])
@pytest.mark.parametrize("skipped_by", ["the script", "a scaler"])
def test_a_batch_without_finite_loss_that_is_skipped_changes_nothing(
    skipped_by: str, skipped: set[int]
) -> None:
    """Its weights are as they were, so automatic mode has nothing to rewind."""
    losses = []
    for mode in ("", "automatic"):
        model, optimizer = script()
        scaler = torch.amp.GradScaler("cpu", enabled=skipped_by == "a scaler")
        options: dict[str, Any] = {"run": "skip", "verbose": False}
        session = esper.attach(model, optimizer, mode=mode, **options) if mode else None
        for step in range(24):
            loss = model(torch.randn(16, 8) * (math.nan if step in skipped else 1)).pow(2).mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            if scaler.is_enabled() or math.isfinite(losses[-1]):
                torch.autograd.backward(scaler.scale(loss))
                scaler.step(optimizer)
                scaler.update()
            if session is not None:
                session.step(loss)

    assert session is not None
    assert session.remedies == ()
    finite = list(filter(math.isfinite, losses))
    assert finite[: len(finite) // 2] == finite[len(finite) // 2 :]


@pytest.mark.parametrize("mode", ["observe", "automatic"])
def test_layers_that_get_their_shape_in_the_first_pass_are_watched(mode: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyBatchNorm1d(), nn.LazyLinear(4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    session = esper.attach(model, optimizer, run="lazy", mode=mode, verbose=False)
    for _ in range(30):
        loss = model(torch.randn(8, 8)).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss)

    assert not [found for found in session.findings() if found.severity == "serious"]


class MaskElsewhere(nn.Module):
    """As the parts of a model on several devices: the mask is where the layer is that uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.out = nn.Embedding(8, 4), nn.Linear(4, 2)

    def forward(self, tokens: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.out(self.tokens(tokens).mean(1))


def test_a_mask_on_another_device_than_the_tokens_switches_nothing_off() -> None:
    model = MaskElsewhere()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    session = esper.attach(model, optimizer, server="", verbose=False)
    for _ in range(3):
        tokens = torch.randint(8, (16, 6))
        loss = model(tokens, attention_mask=torch.ones(16, 6, device="meta").long()).pow(2).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss)
    assert not failed_parts(session)
