"""One conformance suite: every blueprint keeps all promises at every kind of layer, or refuses.

The layers are real modules of a running model, not descriptions: what is tested is the live path.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from esper import blueprints
from esper.contracts import GraftKind, LayerInfo
from esper.exceptions import IncompatibleLayerError
from esper.grafting import apply_graft, certify, digest, stand_in, trace_layers

# Exchanges between ranks sit in no layer: tests/distributed tries them.
SLUGS = [b.slug for b in blueprints.all() if b.kind is not GraftKind.DISTRIBUTED]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

HOSTS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "linear_2d": lambda: (nn.Linear(12, 8), (5, 12)),
    "linear_3d": lambda: (nn.Linear(16, 16), (2, 5, 16)),
    "conv2d": lambda: (nn.Conv2d(4, 8, 3, stride=2, padding=1), (2, 4, 8, 8)),
    "conv2d_unpadded": lambda: (nn.Conv2d(4, 8, 3), (2, 4, 8, 8)),
    "conv2d_depthwise": lambda: (nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 6, 6)),
    "conv1d": lambda: (nn.Conv1d(4, 8, 5, padding=2), (2, 4, 9)),
    "layer_norm": lambda: (nn.LayerNorm(16), (2, 5, 16)),
    "rms_norm": lambda: (nn.RMSNorm(16), (2, 5, 16)),
    "batch_norm": lambda: (nn.BatchNorm2d(8), (4, 8, 3, 3)),
    "gpt2_conv1d": lambda: (Conv1D(48, 16), (2, 5, 16)),
    "lstm": lambda: (nn.LSTM(8, 12, batch_first=True), (2, 5, 8)),
}


class Around(nn.Module):
    """A model around one layer: something before it and after it, as in life."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x * self.gain)
        return torch.tanh(out[0] if isinstance(out, tuple) else out)


def make_model(host: str, dtype: torch.dtype) -> tuple[Around, Tensor, LayerInfo]:
    torch.manual_seed(0)
    layer, shape = HOSTS[host]()
    model = Around(layer).to(dtype)
    x = torch.randn(shape).to(dtype)
    info = next(i for i in trace_layers(model, lambda: model(x)) if i.name == "layer")
    return model, x, info


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("slug", SLUGS)
def test_a_blueprint_keeps_every_promise_or_says_why_not(
    slug: str, host: str, dtype: torch.dtype, training: bool
) -> None:
    blueprint = blueprints.get(slug)
    model, x, info = make_model(host, dtype)
    model.train(training)
    reason = blueprint.supports(info)
    if reason:
        before = digest(model)
        with pytest.raises(IncompatibleLayerError, match="cannot be grafted") as refusal:
            apply_graft(model, info, blueprint)
        assert refusal.value.reason == reason
        assert len(reason.split()) >= 4, "a sentence for a person"
        assert digest(model) == before
        return
    frozen = copy.deepcopy(model)
    before = digest(model)
    expected = model(x).detach()
    frozen(x)  # batch norm counts calls

    receipt = apply_graft(model, info, blueprint, seed=5, thorough=True)

    certificate = receipt.certificate
    assert certificate.passed
    assert certificate.max_abs_diff == 0.0
    assert certificate.live
    assert certificate.rng_neutral
    assert certificate.undo_exact
    assert certificate.host_untouched
    assert math.isfinite(certificate.latency_ms)
    assert torch.equal(model(x), expected)
    assert_next_update_of_the_host_is_the_same(model, frozen, x)
    undone = receipt.undo()
    assert undone.exact
    if not isinstance(model.layer, nn.BatchNorm2d) or not training:
        assert undone.digest == before


def assert_next_update_of_the_host_is_the_same(
    grafted: nn.Module, plain: nn.Module, x: Tensor
) -> None:
    with_graft, without = copy.deepcopy(grafted), plain
    for name, parameter in with_graft.named_parameters():
        parameter.requires_grad_(".esper." not in name)
    for model in (with_graft, without):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        (model(x).float().square().mean() * 1e-2).backward()  # below the clamp's bound
        optimizer.step()
    moved = dict(with_graft.named_parameters())
    for name, parameter in without.named_parameters():
        assert torch.equal(moved[name], parameter), name


SUPPORTED = {
    "proj_lora_64": {
        "linear_2d",
        "linear_3d",
        "conv2d",
        "conv2d_unpadded",
        "conv1d",
        "gpt2_conv1d",
    },
    "mlp_gelu_2048": set(HOSTS) - {"conv2d_unpadded"},
    "attn_std": {"linear_3d", "layer_norm", "rms_norm", "gpt2_conv1d"},
    "proj_ia3": set(HOSTS),
    "mon_act_stats": set(HOSTS),
    "clamp_grad_norm": set(HOSTS),
    "attn_split_qk": {"linear_3d", "layer_norm", "rms_norm", "gpt2_conv1d"},
    "mlp_swiglu_4096": set(HOSTS) - {"conv2d_unpadded"},
    "expert_mlp_1d": set(HOSTS) - {"conv2d_unpadded"},
    "expert_mlp_swiglu": set(HOSTS) - {"conv2d_unpadded"},
    "ln_rms": {"layer_norm"},
}


def home_of(slug: str) -> str:
    """A host that the blueprint fits: a plain sequence layer, where it can be."""
    return "linear_3d" if "linear_3d" in SUPPORTED[slug] else min(SUPPORTED[slug])


@pytest.mark.parametrize("slug", SLUGS)
def test_a_blueprint_fits_the_layers_that_it_should_fit(slug: str) -> None:
    fits = {
        host
        for host in HOSTS
        if not blueprints.get(slug).supports(make_model(host, torch.float32)[2])
    }
    assert fits == SUPPORTED[slug]


@pytest.mark.parametrize("slug", SLUGS)
def test_all_new_tensors_move_and_the_loss_falls(slug: str) -> None:
    blueprint = blueprints.get(slug)
    model, x, info = make_model(home_of(slug), torch.float32)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).tanh()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    info = LayerInfo.from_wire(info.to_wire())  # as it comes back from a server
    receipt = apply_graft(model, info, blueprint)
    new = dict(receipt.graft.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in new.items()}
    if not new:
        assert not blueprint.trainable
        return
    optimizer = torch.optim.AdamW(new.values(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        receipt.graft.on_step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[name], parameter) for name, parameter in new.items())


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("slug", SLUGS)
def test_forecast_memory_is_within_a_tenth_of_what_is_measured(slug: str, host: str) -> None:
    blueprint = blueprints.get(slug)
    model, x, info = make_model(host, torch.float32)
    if blueprint.supports(info):
        assert host not in SUPPORTED[slug]
        return
    for config in blueprint.sizes(info):
        graft = blueprint.build(info, config, seed=0)
        certificate = certify(model.layer, info, blueprint, graft, x, config=config)
        forecast = blueprint.forecast(info, config)
        assert certificate.parameters == forecast.parameters
        assert certificate.memory_mib == pytest.approx(forecast.memory_mib, rel=0.1, abs=1e-9)


@pytest.mark.parametrize("slug", SLUGS)
def test_building_draws_from_no_global_random_stream(slug: str) -> None:
    blueprint = blueprints.get(slug)
    _, _, info = make_model(home_of(slug), torch.float32)
    for seed_all in (random.seed, numpy.random.seed, torch.manual_seed):
        seed_all(11)
    expected = random.random(), numpy.random.random(), torch.rand(3)
    for seed_all in (random.seed, numpy.random.seed, torch.manual_seed):
        seed_all(11)
    blueprint.build(info, seed=1)
    drawn = random.random(), numpy.random.random(), torch.rand(3)
    assert drawn[:2] == expected[:2]
    assert torch.equal(drawn[2], expected[2])


@pytest.mark.parametrize("slug", SLUGS)
def test_one_seed_gives_one_graft(slug: str) -> None:
    blueprint = blueprints.get(slug)
    _, _, info = make_model(home_of(slug), torch.float32)
    first, again, other = (blueprint.build(info, seed=seed) for seed in (4, 4, 5))
    assert digest(first) == digest(again)
    if any(
        parameter.any() and not bool((parameter == 1).all()) for parameter in first.parameters()
    ):
        assert digest(first) != digest(other)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("slug", SLUGS)
def test_a_worker_certifies_on_a_stand_in_from_the_description_alone(slug: str, host: str) -> None:
    blueprint = blueprints.get(slug)
    _, _, info = make_model(host, torch.float32)
    if blueprint.supports(info):
        assert host not in SUPPORTED[slug]
        return
    torch.manual_seed(0)
    stream = torch.get_rng_state()
    there, x = stand_in(LayerInfo.from_wire(info.to_wire()))
    assert torch.equal(torch.get_rng_state(), stream)
    assert tuple(x.shape) == info.in_shape
    graft = blueprint.build(info, seed=0)
    assert certify(there, info, blueprint, graft, x, training=True, thorough=True).passed


@given(
    d_in=st.integers(1, 70),
    d_out=st.integers(1, 70),
    rows=st.integers(1, 3),
    length=st.integers(1, 5),
    slug=st.sampled_from(SLUGS),
    size=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_any_width_is_either_refused_or_certified(
    d_in: int, d_out: int, rows: int, length: int, slug: str, size: int
) -> None:
    blueprint = blueprints.get(slug)
    model = Around(nn.Linear(d_in, d_out))
    x = torch.randn(rows, length, d_in)
    info = next(i for i in trace_layers(model, lambda: model(x)) if i.name == "layer")
    if blueprint.supports(info):
        return
    sizes = blueprint.sizes(info)
    assert [blueprint.parameters(info, s) for s in sizes] == sorted(
        blueprint.parameters(info, s) for s in sizes
    )
    config = sizes[size % len(sizes)]
    receipt = apply_graft(model, info, blueprint, config=config, x=x)
    assert receipt.certificate.passed
    grafted = model(torch.randn(rows + 1, length + 2, d_in))  # other batches, other lengths
    assert grafted.shape == (rows + 1, length + 2, d_out)


@pytest.mark.parametrize("slug", [s for s in SLUGS if blueprints.get(s).mergeable])
@pytest.mark.parametrize("host", ["linear_3d", "conv2d", "conv1d", "gpt2_conv1d", "layer_norm"])
def test_a_merged_graft_is_what_it_was_beside_the_host(slug: str, host: str) -> None:
    model, x, info = make_model(host, torch.float32)
    blueprint = blueprints.get(slug)
    if blueprint.supports(info):
        assert host not in SUPPORTED[slug]
        return
    receipt = apply_graft(model, info, blueprint)
    with torch.no_grad():
        for parameter in receipt.graft.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        expected = model(x)
        receipt.undo(hard=False)
        assert not torch.allclose(model(x), expected, atol=1e-4)
        receipt.graft.merge(model.layer)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("slug", SLUGS)
def test_autocast_keeps_the_hosts_output_dtype(slug: str) -> None:
    model, x, info = make_model(home_of(slug), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
        apply_graft(model, info, blueprints.get(slug))
        grafted = model(x)
    assert grafted.dtype == expected.dtype
    assert torch.equal(grafted, expected)


def test_only_these_kinds_add_nothing_to_train() -> None:
    silent = {b.kind for b in blueprints.all() if not b.trainable}
    assert silent == {GraftKind.OBSERVE, GraftKind.WRAP, GraftKind.DISTRIBUTED}
