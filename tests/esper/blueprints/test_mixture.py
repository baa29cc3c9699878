"""A router, its experts, a capacity limit and a balancer: what they compute, alone and together."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import esper
from esper import blueprints
from esper.blueprints.experts import Expert
from esper.blueprints.routing import CapacityLimit, LossRouter, Router, UseBalancer, balance_loss
from esper.contracts import LayerInfo
from esper.exceptions import IncompatibleLayerError
from esper.grafting import (
    Receipt,
    Surroundings,
    apply_graft,
    digest,
    rebuild,
    slot_of,
    structure,
    trace_layers,
)

ROUTERS = ("router_top2", "router_moe_auxloss")
PARTS = ("cap_fuse_hffn", "load_bal_ema")
EXPERTS = ("expert_mlp_1d", "expert_mlp_swiglu")


def make_host(kind: str = "linear") -> tuple[nn.Sequential, Tensor, LayerInfo]:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5) if kind == "linear" else nn.Conv2d(6, 5, 3, stride=2, padding=1)
    model = nn.Sequential(layer)
    x = torch.randn(3, 7, 6) if kind == "linear" else torch.randn(2, 6, 5, 4)
    return model, x, trace_layers(model, lambda: model(x))[0]


def graft(model: nn.Module, info: LayerInfo, slug: str, **config: object) -> Receipt:
    receipt = apply_graft(model, info, blueprints.get_blueprint(slug), config=config, seed=3)
    assert receipt.certificate.passed
    assert receipt.certificate.max_abs_diff == 0.0
    return receipt


def teach(receipt: Receipt) -> None:
    """As if it had been trained: nothing is zero any more."""
    generator = torch.Generator().manual_seed(receipt.seed)
    with torch.no_grad():
        for parameter in receipt.graft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)


def by_hand(router: Router, x_NI: Tensor) -> Tensor:
    """The mixture, every expert at every position."""
    logits = x_NI @ router.weight_router.T
    best, chosen = logits.topk(2, dim=1)
    outputs = torch.stack(
        [
            F.gelu(x_NI @ into) @ out
            for into, out in zip(router.weight_in, router.weight_out, strict=True)
        ]
    )
    rows = torch.arange(len(x_NI))[:, None]
    picked = outputs.transpose(0, 1)[rows, chosen]
    return (best.softmax(dim=1)[:, :, None] * picked).sum(dim=1)


@pytest.mark.parametrize("slug", ROUTERS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_router_mixes_the_two_best_experts_of_each_position(kind: str, slug: str) -> None:
    model, x, info = make_host(kind)
    model.eval()
    plain = model(x)
    receipt = graft(model, info, slug, experts=5, hidden=4)
    teach(receipt)
    assert isinstance(receipt.graft, Router)
    seen = x if kind == "linear" else x[:, :, ::2, ::2].movedim(1, -1)
    change = by_hand(receipt.graft, seen.reshape(-1, 6)).reshape(*seen.shape[:-1], 5)
    expected = plain + (change if kind == "linear" else change.movedim(-1, 1))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("slug", [*ROUTERS, *EXPERTS, "moe_top2_balanced"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_only_what_is_routed_is_computed_and_the_flops_are_those_forecast(
    kind: str, slug: str
) -> None:
    model, x, info = make_host(kind)
    blueprint = blueprints.get_blueprint(slug)
    for config in blueprint.sizes(info):
        made, y = blueprint.build(info, config, seed=0), model(x)
        with FlopCounterMode(display=False) as counter:
            made.combine(x, y)
        assert counter.get_total_flops() == blueprint.flops(info, config)


def test_noise_is_for_training_and_moves_with_the_step_alone() -> None:
    model, x, info = make_host()
    router = graft(model, info, "router_top2", experts=8, noise=2.0).graft
    assert isinstance(router, Router)
    logits = router.logits(x).flatten(0, 1)
    torch.manual_seed(5)
    stream = torch.get_rng_state()
    first, again = router._choose(logits), router._choose(logits)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), stream)
    router.on_step()
    assert not torch.equal(router._choose(logits), first)
    router.eval()
    assert torch.equal(router._choose(logits), logits.topk(2).indices)


def test_the_noise_is_standard_normal_and_differs_between_seeds() -> None:
    _, _, info = make_host()
    one, other = (blueprints.get_blueprint("router_top2").build(info, seed=seed) for seed in (1, 2))
    assert isinstance(one, Router)
    assert isinstance(other, Router)
    like = torch.empty(20_000, 4)
    noise = one._noise(like)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1.0) < 0.02
    assert noise.abs().max() < 6
    across = torch.corrcoef(torch.stack([noise.flatten(), other._noise(like).flatten()]))[0, 1]
    assert abs(across) < 0.02
    one.on_step()
    later = torch.corrcoef(torch.stack([noise.flatten(), one._noise(like).flatten()]))[0, 1]
    assert abs(later) < 0.02


@pytest.mark.parametrize("slug", ROUTERS)
def test_activation_checkpointing_gives_the_same_gradients(slug: str) -> None:
    model, x, info = make_host()
    receipt = graft(model, info, slug, noise=1.0)
    teach(receipt)
    graft(model, info, "load_bal_ema")
    for _ in range(3):
        receipt.graft.on_step()
    found = []
    for run in (model, lambda value: checkpoint(model, value, use_reentrant=False)):
        model.zero_grad()
        run(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        receipt.graft.forget()
    assert len(found[0]) == 5
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# -- the balancing loss ------------------------------------------------------------------------


def ready_loss_router(**config: object) -> tuple[nn.Sequential, Tensor, LossRouter]:
    model, x, info = make_host()
    receipt = graft(model, info, "router_moe_auxloss", noise=0.0, ramp_steps=2, **config)
    teach(receipt)
    assert isinstance(receipt.graft, LossRouter)
    return model, x, receipt.graft


def explicit(model: nn.Sequential, x: Tensor, router: LossRouter) -> Tensor:
    logits = router.logits(x).flatten(0, 1)
    return balance_loss(logits, logits.topk(2).indices)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_the_injected_gradient_is_that_of_the_explicit_loss() -> None:
    model, x, router = ready_loss_router(coefficient=0.3)
    for _ in range(5):
        router.on_step()
    model(x).square().mean().backward()
    injected = gradients(model)
    model.zero_grad()
    router.eval()  # adds nothing
    (model(x).square().mean() + 0.3 * explicit(model, x, router)).backward()
    for mine, theirs in zip(injected, gradients(model), strict=True):
        torch.testing.assert_close(mine, theirs)
    model.zero_grad()
    model(x).square().mean().backward()
    assert not torch.allclose(injected[2], gradients(model)[2])


def test_the_coefficient_grows_from_zero_to_its_limit() -> None:
    _, _, router = ready_loss_router(coefficient=0.3)
    seen = [float(router.coefficient)]
    for _ in range(4):
        router.on_step()
        seen.append(float(router.coefficient))
    assert seen == pytest.approx([0.0, 0.15, 0.3, 0.3, 0.3])


def test_with_gradient_accumulation_the_loss_counts_once_for_a_step() -> None:
    model, x, router = ready_loss_router(coefficient=0.3)

    def accumulate() -> list[Tensor]:
        model.zero_grad()
        for _ in range(4):
            (model(x).square().mean() / 4).backward()
        return gradients(model)

    for _ in range(3):  # how many passes a step takes is known from the step before
        accumulate()
        router.on_step()
    accumulated = accumulate()
    model.zero_grad()
    router.eval()
    (model(x).square().mean() + 0.3 * explicit(model, x, router)).backward()
    for mine, theirs in zip(accumulated, gradients(model), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_gradient_scaler_is_refused_by_the_router_with_a_loss_only() -> None:
    model, _, info = make_host()
    scaled = Surroundings(scaler=torch.amp.GradScaler("cpu", enabled=True))
    with pytest.raises(IncompatibleLayerError, match="scaler"):
        apply_graft(
            model, info, blueprints.get_blueprint("router_moe_auxloss"), surroundings=scaled
        )
    apply_graft(model, info, blueprints.get_blueprint("router_top2"), surroundings=scaled)


# -- capacity ----------------------------------------------------------------------------------


def served_by(router: Router, x: Tensor) -> list[int]:
    return router._seats(router._choose(router.logits(x).flatten(0, -2)))[1]


def overloaded(experts: int = 4) -> tuple[nn.Sequential, Tensor, Router, CapacityLimit]:
    """One expert is everybody's first choice."""
    model, x, info = make_host()
    router = graft(model, info, "router_top2", experts=experts, noise=0.0)
    teach(router)
    x = x.abs()
    with torch.no_grad():
        router.graft.weight_router[0] = 10.0
    expected = model(x)
    limit = graft(model, info, "cap_fuse_hffn", ramp_steps=10)
    assert torch.equal(model(x), expected), "nothing changes at once"
    assert isinstance(router.graft, Router)
    assert isinstance(limit.graft, CapacityLimit)
    return model, x, router.graft, limit.graft


def test_the_limit_comes_down_by_schedule_and_then_bounds_every_expert() -> None:
    _, x, router, limit = overloaded()
    most = [max(served_by(router, x))]
    for _ in range(12):
        limit.on_step()
        most.append(max(served_by(router, x)))
    assert most[0] == 21
    assert sorted(most, reverse=True) == most
    assert most[-1] == 14  # ceil(1.25 · 2 · 21 / 4)
    assert max(served_by(router, x[:, :1])) == 3
    assert max(served_by(router, x[:1, :5])) == 4  # never below four


def test_a_position_beyond_the_limit_keeps_the_path_of_the_host() -> None:
    model, x, router, limit = overloaded(experts=2)  # both experts are everybody's
    for _ in range(10):
        limit.on_step()
    limit.factor = 0.25
    changed = (model(x) != model[0].forward(x)).any(dim=-1).flatten()
    assert changed.tolist() == [True] * 6 + [False] * 15  # the first come are served
    served = served_by(router, x)
    assert served == [6, 6]


# -- balance -----------------------------------------------------------------------------------


def trained_imbalance(*extra: str, slug: str = "router_top2", **config: object) -> float:
    """Largest share of seats of an expert, times E, after a training that starts lopsided."""
    model, _, info = make_host()
    router = graft(model, info, slug, experts=4, **config)
    with torch.no_grad():
        router.graft.weight_router[0] += 1.2
    others = [graft(model, info, part) for part in extra]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    teacher = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5)).requires_grad_(False)
    use = torch.zeros(4)
    for step in range(300):
        x = torch.rand(32, 6, generator=generator)
        optimizer.zero_grad()
        (model(x) - teacher(x)).square().mean().backward()
        optimizer.step()
        for receipt in (router, *others):
            receipt.graft.on_step()
        if step >= 200:
            assert isinstance(router.graft, Router)
            use += torch.tensor(served_by(router.graft, x))
    return float(use.max() / use.sum() * 4)


def test_the_balancer_evens_out_a_lopsided_router() -> None:
    without, balanced = trained_imbalance(), trained_imbalance("load_bal_ema")
    assert without > 1.7
    assert balanced < without - 0.4


def test_the_balancing_loss_evens_out_a_lopsided_router() -> None:
    without = trained_imbalance()
    balanced = trained_imbalance(slug="router_moe_auxloss", coefficient=0.3)
    assert balanced < without - 0.3


def test_the_bias_moves_the_choice_and_not_the_gates() -> None:
    model, x, info = make_host()
    router = graft(model, info, "router_top2", experts=2)
    teach(router)
    expected = model.eval()(x)
    balancer = graft(model, info, "load_bal_ema").graft
    assert isinstance(balancer, UseBalancer)
    balancer.bias_E += torch.tensor([5.0, -5.0])
    torch.testing.assert_close(model(x), expected)  # of two experts both are chosen anyway


# -- together ----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_a_part_without_a_router_is_refused_and_named(part: str) -> None:
    model, _, info = make_host()
    before = digest(model)
    with pytest.raises(IncompatibleLayerError, match="needs router_moe_auxloss or router_top2"):
        apply_graft(model, info, blueprints.get_blueprint(part))
    assert digest(model) == before


def test_a_softly_removed_router_takes_what_needs_it_along_and_leaves_the_expert() -> None:
    model, x, info = make_host()
    router = graft(model, info, "router_top2")
    expert = graft(model, info, "expert_mlp_1d")
    parts = [graft(model, info, part) for part in PARTS]
    teach(expert)
    undone = router.undo(hard=False)
    assert sorted(undone.discarded) == [f"{info.name}/{part}" for part in PARTS]
    assert [part.present for part in parts] == [False, False]
    assert expert.present
    alone, _, _ = make_host()
    again = graft(alone, info, "expert_mlp_1d")
    again.graft.load_state_dict(expert.graft.state_dict())
    assert torch.equal(model(x), alone(x)), "it goes on by itself"


def test_a_joined_expert_gets_its_share_of_the_softmax() -> None:
    model, x, info = make_host()
    router, expert = graft(model, info, "router_top2"), graft(model, info, "expert_mlp_swiglu")
    assert isinstance(router.graft, Router)
    assert isinstance(expert.graft, Expert)
    teach(expert)
    logits = torch.cat([x @ expert.graft.key.T, router.graft.logits(x)], dim=-1)
    expected = logits.softmax(dim=-1)[..., :1] * expert.graft.branch.change(x)
    torch.testing.assert_close(model(x), model[0].forward(x) + expected)


def test_an_expert_that_was_there_before_the_router_goes_on_as_it_was() -> None:
    model, x, info = make_host()
    teach(graft(model, info, "expert_mlp_1d"))
    expected = model(x)
    graft(model, info, "router_top2")
    assert torch.equal(model(x), expected)


def full_assembly() -> tuple[nn.Sequential, Tensor, list[Receipt]]:
    model, x, info = make_host()
    receipts = []
    for slug in ("router_top2", "expert_mlp_swiglu", *PARTS):
        receipts.append(graft(model, info, slug))
        teach(receipts[-1])
    for receipt in receipts:
        for _ in range(60):
            receipt.graft.on_step()
    with torch.no_grad():
        receipts[3].graft.bias_E += torch.tensor([3.0, 0.0, 0.0, -3.0])
    return model, x, receipts


def test_copies_and_pickles_of_an_assembly_are_independent() -> None:
    model, x, receipts = full_assembly()
    expected = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own
        assert torch.equal(copied(x), expected)
        slot = slot_of(copied[0])
        assert slot is not None
        theirs = slot.grafts()["router_top2"]
        assert isinstance(theirs, Router)
        assert theirs._limits[0] is slot.grafts()["cap_fuse_hffn"]
        assert theirs._balancers[0] is not receipts[3].graft
        with torch.no_grad():
            theirs._balancers[0].bias_E.add_(torch.tensor([-9.0, 0.0, 0.0, 9.0]))
        assert not torch.equal(copied(x), expected)
        assert torch.equal(model(x), expected)


def test_an_exported_assembly_computes_the_same() -> None:
    model, x, _ = full_assembly()
    expected = model.eval()(x)
    exported = esper.export(model)
    assert torch.equal(exported(x), expected)
    assert torch.equal(model(x), expected)
    assert slot_of(exported[0]) is None


def test_an_assembly_comes_back_from_a_checkpoint() -> None:
    model, x, _ = full_assembly()
    manifest = json.loads(json.dumps(structure(model)))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    again, _, _ = make_host()
    rebuild(again, manifest)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert digest(again) == digest(model)
    for _ in range(3):
        assert torch.equal(again(x), model(x))
        for each in (again, model):
            slot = slot_of(each[0])
            assert slot is not None
            for member in slot.grafts().values():
                member.on_step()


def test_a_graft_that_is_set_aside_is_unknown_to_its_neighbours() -> None:
    model, x, _ = full_assembly()
    slot = slot_of(model[0])
    assert slot is not None
    whole = model(x)
    for part in PARTS:
        with slot.without(part):
            assert not torch.equal(model(x), whole)
        assert torch.equal(model(x), whole)


MEMBERS = ("router_top2", "expert_mlp_1d", *PARTS, "proj_ia3")


@given(moves=st.lists(st.sampled_from(MEMBERS), min_size=2, max_size=9))
@settings(max_examples=25, deadline=None)
def test_members_come_and_go_in_any_order_and_all_is_undone_to_the_bit(moves: list[str]) -> None:
    model, x, info = make_host()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    around = Surroundings([optimizer])
    before, expected = digest(model), model(x)
    first = apply_graft(model, info, blueprints.get_blueprint("mon_act_stats"), surroundings=around)
    living: dict[str, Receipt] = {}
    for slug in moves:
        living = {name: receipt for name, receipt in living.items() if receipt.present}
        if slug in living:
            living.pop(slug).undo(hard=False)
            continue
        blueprint, output = blueprints.get_blueprint(slug), model(x)
        if blueprint.requires and not blueprint.requires & living.keys():
            with pytest.raises(IncompatibleLayerError):
                apply_graft(model, info, blueprint)
        else:
            living[slug] = apply_graft(model, info, blueprint, surroundings=around, x=x)
            assert living[slug].certificate.max_abs_diff == 0.0
        assert torch.equal(model(x), output)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        for receipt in living.values():
            receipt.graft.on_step()
    undone = first.undo()
    assert undone.digest == before
    assert torch.equal(model(x), expected)
    assert len(optimizer.param_groups) == 1
