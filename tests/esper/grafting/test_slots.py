"""Slots: copies, pickles, compiled models and the user's own hooks keep working."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import blueprints
from esper.exceptions import GraftError
from esper.grafting import (
    apply_graft,
    digest,
    prepare_slots,
    remove_slots,
    slot_of,
    slots,
    trace_layers,
    watch,
)
from tests.esper.tiny_models import TinyTransformer, make_training


def grafted_pair() -> tuple[nn.Module, Tensor]:
    """A model with a graft that has learnt something, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(4, 6)
    info = next(i for i in trace_layers(model, lambda: model(x)) if i.name == "0")
    receipt = apply_graft(model, info, blueprints.get_blueprint("mlp_gelu_2048"))
    with torch.no_grad():
        receipt.graft.weight_out.fill_(0.3)
    return model, x


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes


def test_an_empty_slot_adds_no_key_and_changes_no_output() -> None:
    model = TinyTransformer().eval()
    tokens = torch.randint(0, 17, (2, 5))
    keys, before, expected = list(model.state_dict()), digest(model), model(tokens)
    names = [name for name, _ in model.named_modules() if name.endswith(("wide", "norm"))]
    assert prepare_slots(model, names) == tuple(names)
    assert prepare_slots(model, names) == ()
    assert list(model.state_dict()) == keys
    assert digest(model) == before
    assert torch.equal(model(tokens), expected)
    assert set(remove_slots(model)) == set(names)
    assert not model.blocks[0].wide._forward_hooks


@pytest.mark.parametrize("layer", ["blocks", ""])
def test_containers_get_no_slot(layer: str) -> None:
    model = TinyTransformer() if layer else nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(GraftError, match="container"):
        prepare_slots(model, [layer])
    assert list(slots(model)) == []


def test_all_slots_are_prepared_or_none() -> None:
    model = TinyTransformer()
    with pytest.raises(GraftError):
        prepare_slots(model, ["head", "nowhere"])
    assert slot_of(model.head) is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_works_by_itself(duplicate) -> None:
    model, x = grafted_pair()
    expected = model(x)
    copied = duplicate(model)
    assert torch.equal(copied(x), expected)
    with torch.no_grad():
        slot_of(copied[0]).grafts()["mlp_gelu_2048"].weight_out.zero_()
    assert not torch.equal(copied(x), expected)
    assert torch.equal(model(x), expected)
    slot_of(copied[0]).take_out("mlp_gelu_2048")
    assert remove_slots(copied) == ("0",)
    assert not copied[0]._forward_hooks
    assert torch.equal(model(x), expected)


class Noting(pickle.Unpickler):
    """Reads a pickle and notes the places in the library that it names."""

    def __init__(self, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled))
        self.places: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(("esper.grafting", "esper.sdk")):
            self.places.add(f"{module}.{name}")
        return super().find_class(module, name)


def test_a_model_of_an_earlier_version_finds_its_parts_where_they_were() -> None:
    """A pickle names them by these places: who moves one cannot load the models of before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = esper.attach(model, optimizer, server=None, verbose=False)
    x = torch.randn(4, 6)
    receipt = esper.graft(model, "2", "mlp_gelu_2048", since="0", optimizer=optimizer, sample=x)
    model.kept = [receipt, session]  # type: ignore[assignment]

    reader = Noting(pickle.dumps(model))
    reader.load()

    session.close()
    assert reader.places == {
        "esper.grafting.manifest.GraftRecord",
        "esper.grafting.receipts.CopiedReceipt",
        "esper.grafting.slot.Slot",
        "esper.grafting.slot.run_slot",
        "esper.grafting.spans.Carrier",
        "esper.grafting.spans.ScopeHook",
        "esper.grafting.spans.Source",
        "esper.grafting.state_dicts.follow_state",
        "esper.sdk.copied_session.CopiedSession",
    }


def test_an_unpickled_hook_is_not_overwritten_by_the_next_one() -> None:
    model, x = grafted_pair()
    copied = pickled(model)
    calls = []
    copied[0].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(copied(x), model(x))
    assert calls == [1]


def test_hooks_of_a_kind_have_one_number_at_every_layer() -> None:
    """torch 2.10 guards on the numbers: without this, each block has compiled code of its own."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    model[1].register_forward_hook(lambda *call: None)
    prepare_slots(model, ["0", "1", "2"])
    assert len({slot.handle.id for _, _, slot in slots(model) if slot.handle}) == 1
    plain = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    plain[1].register_forward_hook(lambda *call: None)
    ends = [watch(plain, f"{place}", lambda x, y: None) for place in range(3)]
    numbers = [{*layer._forward_hooks_with_kwargs} for layer in plain]
    assert numbers[0] == numbers[1] == numbers[2]
    again = watch(plain, "0", lambda x, y: None)
    assert len(plain[0]._forward_hooks) == 2
    for end in (again, *ends):
        end()
    assert [len(layer._forward_hooks) for layer in plain] == [0, 1, 0]


def test_a_hook_leaves_the_number_of_another_process_alone() -> None:
    model, _ = grafted_pair()
    (_, _, slot), *_ = slots(model)
    assert slot.handle is not None
    plain, calls = nn.Linear(6, 6), []
    plain._forward_hooks[slot.handle.id] = lambda *call: calls.append(1)
    prepare_slots(plain, [""])
    plain(torch.randn(2, 6))
    assert calls == [1]
    remove_slots(plain)
    assert len(plain._forward_hooks) == 1


def test_the_clamp_follows_a_deep_copy() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    x = 100 * torch.randn(4, 6)
    info = next(i for i in trace_layers(model, lambda: model(x)) if i.name == "0")
    apply_graft(model, info, blueprints.get_blueprint("clamp_grad_norm"), config={"max_norm": 0.5})
    model(x).square().sum().backward()
    for net in (copy.deepcopy(model), pickled(model)):
        net.zero_grad()
        net(x).square().sum().backward()
        grads = [net[0].weight.grad, net[0].bias.grad]
        total = torch.linalg.vector_norm(torch.stack([grad.norm() for grad in grads]))
        assert total.item() == pytest.approx(0.5, rel=1e-4)
        assert net[1].weight.grad.norm() > 10, "other layers are left alone"


def test_the_clamp_keeps_the_direction() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6))
    plain = copy.deepcopy(model)
    x = torch.randn(4, 6)
    info = trace_layers(model, lambda: model(x))[0]
    apply_graft(model, info, blueprints.get_blueprint("clamp_grad_norm"), config={"max_norm": 0.1})
    for net in (model, plain):
        net(x).square().sum().backward()
    ratio = model[0].weight.grad / plain[0].weight.grad
    assert ratio.std() < 1e-5
    torch.testing.assert_close(ratio[0, 0], (model[0].bias.grad / plain[0].bias.grad)[0])


def test_a_layer_that_runs_twice_is_grafted_twice() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(torch.tanh(self.cell(x)))

    torch.manual_seed(0)
    model, x = Recurrent(), torch.randn(3, 6)
    (info,) = trace_layers(model, lambda: model(x))
    assert info.calls == 2
    receipt = apply_graft(model, info, blueprints.get_blueprint("proj_ia3"))
    with torch.no_grad():
        receipt.graft.gain.fill_(2.0)
        weight, bias = model.cell.weight, model.cell.bias
        by_hand = 2 * (torch.tanh(2 * (x @ weight.T + bias)) @ weight.T + bias)
    torch.testing.assert_close(model(x), by_hand)


def test_a_watcher_sees_the_host_before_its_grafts_and_is_not_copied() -> None:
    model, x = grafted_pair()
    seen: list[tuple[Tensor, Tensor]] = []
    end = watch(model, "0", lambda x, y: seen.append((x, y)))
    model(x)
    weight, bias = model[0].weight, model[0].bias
    assert seen[0][0] is x
    assert torch.equal(seen[0][1], nn.functional.linear(x, weight, bias))
    copy.deepcopy(model)(x)
    assert len(seen) == 1
    end()
    end()
    model(x)
    assert len(seen) == 1


def test_a_tuple_output_keeps_its_other_parts() -> None:
    training = make_training()
    tokens = training.batches[0][:, :-1]
    infos = trace_layers(training.model, lambda: training.model(tokens))
    info = next(i for i in infos if i.name == "blocks.0.attention")
    receipt = apply_graft(training.model, info, blueprints.get_blueprint("proj_ia3"))
    attention = training.model.blocks[0].attention.eval()
    h = torch.randn(2, 4, 16)
    out, weights = attention(h, h, value=h)
    with torch.no_grad():
        receipt.graft.gain.fill_(2.0)
    doubled, same_weights = attention(h, h, value=h)
    torch.testing.assert_close(doubled, 2 * out)
    assert torch.equal(weights, same_weights)


def test_activation_statistics_are_those_of_the_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    x = torch.randn(32, 4)
    info = trace_layers(model, lambda: model(x))[0]
    receipt = apply_graft(
        model, info, blueprints.get_blueprint("mon_act_stats"), config={"every": 1}
    )
    assert all(value != value for value in receipt.graft.signals().values()), "not measured yet"
    with torch.no_grad():
        model[0].weight[:3].zero_()
        model[0].bias[:3].zero_()
    y = model(x)
    signals = receipt.graft.signals()
    assert signals["act_mean"] == pytest.approx(y.mean().item(), abs=1e-6)
    assert signals["act_std"] == pytest.approx(y.std(correction=0).item(), rel=1e-5)
    assert signals["dead_fraction"] == 0.5


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's own
@pytest.mark.parametrize("masked", [False, True])
def test_an_encoder_without_its_fused_path_computes_the_same(masked: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = masked
    with torch.no_grad():
        fused = encoder(x, src_key_padding_mask=mask)
        infos = trace_layers(encoder, lambda: encoder(x))
        prepare_slots(encoder, [info.name for info in infos if info.graftable])
        ordinary = encoder(x, src_key_padding_mask=mask)
    torch.testing.assert_close(ordinary[~mask], fused[~mask], atol=1e-6, rtol=1e-5)


def test_a_graft_runs_where_a_padded_batch_becomes_a_nested_one() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nested tensors are a prototype
        model = nn.TransformerEncoder(layer, 2).eval()
        x, padding = torch.randn(3, 6, 16), torch.zeros(3, 6, dtype=torch.bool)
        padding[0, 4:] = True
        with torch.no_grad():
            before = model(x, src_key_padding_mask=padding)
            receipt = esper.graft(model, "layers.0.linear1", "proj_ia3")
            assert torch.equal(model(x, src_key_padding_mask=padding), before)
            for parameter in receipt.graft.parameters():
                parameter.mul_(3)
            assert not torch.equal(model(x, src_key_padding_mask=padding), before)
            assert model(x, src_key_padding_mask=padding).shape == before.shape
