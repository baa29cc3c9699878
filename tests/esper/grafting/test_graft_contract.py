"""One conformance suite: each blueprint keeps the graft contract at each kind of layer, or refuses.

The blueprints are those of the catalogue, found and not listed, and the layers are real modules of
a running model, not descriptions: what is tested is the live path.
"""

from __future__ import annotations

import copy
import hashlib
import math
import random
import re
from functools import cache
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from esper import blueprints
from esper.blueprints.base import MIB
from esper.contracts import LayerInfo
from esper.exceptions import IncompatibleLayerError
from esper.grafting import (
    Surroundings,
    apply_graft,
    certify,
    digest,
    prepare_slots,
    remove_slots,
    stand_in,
    trace_layers,
    watch,
)
from tests.covers import cover_and_rest
from tests.esper.grafting.layer_kinds import (
    SUPPORT_TABLE,
    Around,
    Subject,
    described,
    make_subject,
    reasons,
    support_table,
    supported_pairs,
)
from tests.esper.tiny_models import IN_LAYERS, meet_requirements

SLUGS = IN_LAYERS
PAIRS = supported_pairs()
# Layers inside a whole model cost five times as much; one way to run them finds what there is.
IN_WHOLE_MODELS = ("gpt2_queries", "gpt2_attention", "llama_", "bert_")
# name -> (dtype of the weights, autocast, training)
WAYS: dict[str, tuple[torch.dtype, bool, bool]] = {
    "fp32": (torch.float32, False, True),
    "fp64_eval": (torch.float64, False, False),
    "bf16_eval": (torch.bfloat16, False, False),
    "autocast": (torch.float32, True, True),
}


def ways_of(kind: str) -> list[str]:
    return ["autocast"] if kind.startswith(IN_WHOLE_MODELS) else list(WAYS)


def rotated(values: list[str], places: int) -> list[str]:
    """So that the cover, which prefers what comes first, uses all values alike."""
    return values[places % len(values) :] + values[: places % len(values)]


CONTRACT = [
    (slug, kind, way)
    for place, (slug, kind) in enumerate(PAIRS)
    for way in rotated(ways_of(kind), place)
]
BESIDE_THE_RUN = [
    (slug, kind, what)
    for place, (slug, kind) in enumerate(PAIRS)
    for what in rotated(["forecast", "stand-in"], place)
]


def beside_the_run(what: str) -> list[Any]:
    """(slug, kind) of the rows with this test; a cover of them all is spread over the tests."""
    rows = cover_and_rest(BESIDE_THE_RUN)
    return [pytest.param(*row.values[:2], marks=row.marks) for row in rows if row.values[2] == what]


def test_the_table_of_what_is_supported_is_the_reviewed_one() -> None:
    """After a wanted change: ``python -m tests.esper.grafting.layer_kinds``, and read the diff."""
    assert support_table() == SUPPORT_TABLE.read_text()


@pytest.mark.parametrize("slug", SLUGS)
def test_every_refusal_is_a_sentence_for_a_person_and_touches_nothing(slug: str) -> None:
    blueprint = blueprints.get_blueprint(slug)
    for kind, reason in reasons(blueprint):
        if not reason:
            continue
        assert len(reason.split()) > 4, reason
        assert not re.search(r"[_{}<>=]|\(\)|\bNone\b|Error|\.$", reason), reason
        subject = make_subject(kind)
        before = fingerprint(subject.model)
        with pytest.raises(IncompatibleLayerError) as refusal:
            apply_graft(subject.model, subject.info, blueprint)
        assert refusal.value.reason == reason
        for named in (reason, slug, subject.info.name):
            assert named in str(refusal.value)
        assert fingerprint(subject.model) == before


@cache
def lstms_train_in_bfloat16() -> bool:
    """torch raises on a processor without AVX-512, for which oneDNN has no such LSTM."""
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            nn.LSTM(8, 12)(torch.randn(5, 2, 8))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(("slug", "kind", "way"), cover_and_rest(CONTRACT))
def test_a_graft_keeps_the_whole_contract(slug: str, kind: str, way: str) -> None:
    dtype, autocast, training = WAYS[way]
    if kind.startswith("lstm") and not lstms_train_in_bfloat16():
        autocast = False  # the graft and the layer still meet
    subject = make_subject(kind, dtype)
    model = subject.model.train(training)
    prepare_slots(model, [subject.info.name])  # as attach does; an empty slot stays
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    subject.autocast = autocast
    surroundings = Surroundings([optimizer])
    meet_requirements(model, subject.info, blueprints.get_blueprint(slug), surroundings)
    train_step(subject, model, optimizer)
    plain = copy.deepcopy(model)
    expected = run(subject, model)
    run(subject, plain)  # a batch norm counts calls
    before = fingerprint(model, optimizer)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        receipt = apply_graft(
            model,
            subject.info,
            blueprints.get_blueprint(slug),
            surroundings=surroundings,
            seed=5,
            thorough=training,
        )

    certificate = receipt.certificate
    assert certificate.passed, certificate.failures
    assert certificate.max_abs_diff <= certificate.tolerance
    assert math.isfinite(certificate.latency_ms) or not training
    assert torch.equal(run(subject, model), expected)
    assert_next_update_of_the_host_is_the_same(subject, plain)
    assert_all_new_tensors_wake_up(subject)
    train_step(subject, model, optimizer)
    undone = receipt.undo()
    assert undone.exact
    assert fingerprint(model, optimizer) == before
    if trainable(model):
        train_step(subject, model, optimizer)
        assert fingerprint(model, optimizer) != before, "the fingerprint sees a step"


def run(subject: Subject, model: nn.Module) -> Tensor:
    torch.manual_seed(3)
    return subject.run(model).detach()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train_step(subject: Subject, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    # Small: below the bound of the gradient clamp, which is there to change updates.
    (subject.run(model).float().square().mean() * 1e-2).backward()
    optimizer.step()


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> str:
    """SHA-256 of all that a hard undo must bring back; it shares no code with what is tested."""
    total = hashlib.sha256()
    first_names: dict[int, str] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            first = first_names.setdefault(id(tensor), name)
            total.update(f"{name} {first} {tensor.requires_grad}".encode())
            total.update(repr(plain_values(tensor)).encode())
    total.update(repr([name for name, _ in model.named_modules()]).encode())
    total.update(repr(plain_values(optimizer.state_dict() if optimizer else None)).encode())
    streams = (random.getstate(), numpy.random.get_state(), torch.get_rng_state())
    total.update(repr(plain_values(streams)).encode())
    return total.hexdigest()


def plain_values(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        flat = tree.detach().reshape(-1).view(torch.uint8)
        return str(tree.dtype), tuple(tree.shape), hashlib.sha256(flat.numpy()).hexdigest()
    if isinstance(tree, numpy.ndarray):
        return tree.tobytes()
    if isinstance(tree, dict):
        return [(key, plain_values(value)) for key, value in tree.items()]
    if isinstance(tree, list | tuple):
        return [plain_values(value) for value in tree]
    return tree


def assert_next_update_of_the_host_is_the_same(subject: Subject, plain: nn.Module) -> None:
    frozen = copy.deepcopy(subject.model)
    for model in (frozen, plain):
        for name, parameter in model.named_parameters():
            if ".esper." in name:
                parameter.requires_grad_(False)
        torch.manual_seed(4)
        train_step(subject, model, torch.optim.SGD(trainable(model), lr=0.1))
    moved = dict(frozen.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(moved[name], parameter), name


def assert_all_new_tensors_wake_up(subject: Subject) -> None:
    """Every new tensor has a gradient that is not zero within two steps, beside its real host."""
    model = copy.deepcopy(subject.model).train()
    slot = model.get_submodule(f"{subject.info.name}.esper")
    new = dict(slot.named_parameters())
    asleep = set(new)
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    for _ in range(2):
        train_step(subject, model, optimizer)
        asleep -= {name for name, p in new.items() if p.grad is not None and p.grad.any()}
        for graft in slot.children():
            assert isinstance(graft, blueprints.Graft)
            graft.on_step()
    assert not asleep


def home_of(slug: str) -> str:
    """A kind that the blueprint fits: a plain sequence layer, where it can be."""
    fits = [kind for pair, kind in PAIRS if pair == slug]
    return "linear_3d" if "linear_3d" in fits else fits[0]


@pytest.mark.parametrize("slug", SLUGS)
def test_all_new_tensors_move_and_the_loss_falls(slug: str) -> None:
    blueprint = blueprints.get_blueprint(slug)
    subject = make_subject(home_of(slug))
    model, x = subject.model.eval().requires_grad_(False), subject.x
    target = torch.rand(model(x).shape, generator=torch.Generator().manual_seed(3))
    info = LayerInfo.from_wire(subject.info.to_wire())  # as it comes back from a server
    meet_requirements(model, info, blueprint)
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


@pytest.mark.parametrize(("slug", "kind"), beside_the_run("forecast"))
def test_forecast_memory_is_within_a_tenth_of_what_is_measured(slug: str, kind: str) -> None:
    blueprint = blueprints.get_blueprint(slug)
    dtype = torch.float32 if len(kind) % 2 else torch.bfloat16  # each on half of the kinds
    subject = make_subject(kind, dtype)
    x = layer_input(subject)
    # A linear map keeps a copy of an input with gaps, each of a gated pair its own; a layer's
    # description does not tell, so the forecast cannot count them.
    copies_mib = 0.0 if x.is_contiguous() else 2 * blueprint.parts * x.nbytes / MIB
    for config in blueprint.sizes(subject.info):
        graft = blueprint.build(subject.info, config, seed=0)
        graft.inherit(subject.host)
        certificate = certify(subject.host, subject.info, blueprint, graft, x, config=config)
        forecast = blueprint.forecast(subject.info, config)
        assert certificate.parameters == forecast.parameters
        measured, expected = certificate.memory_mib, forecast.memory_mib
        assert 0.9 * expected - 1e-9 <= measured <= 1.1 * expected + copies_mib + 1e-9


def layer_input(subject: Subject) -> Tensor:
    """What really goes into the layer, in the model's own run."""
    seen: list[Tensor] = []
    end = watch(subject.model, subject.info.name, lambda x, y: seen.append(x.detach()))
    subject.model(subject.x)
    end()
    remove_slots(subject.model)
    return seen[0]


@pytest.mark.parametrize("slug", SLUGS)
def test_building_draws_from_no_global_random_stream(slug: str) -> None:
    blueprint = blueprints.get_blueprint(slug)
    info = described(home_of(slug))
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
    blueprint = blueprints.get_blueprint(slug)
    info = described(home_of(slug))
    first, again, other = (blueprint.build(info, seed=seed) for seed in (4, 4, 5))
    assert digest(first) == digest(again)
    if any(
        parameter.any() and not bool((parameter == 1).all()) for parameter in first.parameters()
    ):
        assert digest(first) != digest(other)


@pytest.mark.parametrize(("slug", "kind"), beside_the_run("stand-in"))
def test_a_worker_certifies_on_a_stand_in_from_the_description_alone(slug: str, kind: str) -> None:
    blueprint, info = blueprints.get_blueprint(slug), described(kind)
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
    blueprint = blueprints.get_blueprint(slug)
    model = Around(nn.Linear(d_in, d_out)).eval()
    x = torch.randn(rows, length, d_in)
    info = next(i for i in trace_layers(model, lambda: model(x)) if i.name == "layer")
    if blueprint.supports(info):
        return
    sizes = blueprint.sizes(info)
    assert [blueprint.parameters(info, s) for s in sizes] == sorted(
        blueprint.parameters(info, s) for s in sizes
    )
    config = sizes[size % len(sizes)]
    meet_requirements(model, info, blueprint)
    receipt = apply_graft(model, info, blueprint, config=config, x=x)
    assert receipt.certificate.passed
    grafted = model(torch.randn(rows + 1, length + 2, d_in))  # other batches, other lengths
    assert grafted.shape == (rows + 1, length + 2, d_out)


@pytest.mark.parametrize(
    ("slug", "kind"),
    [
        (slug, kind)
        for slug, kind in PAIRS
        if blueprints.get_blueprint(slug).mergeable
        and kind in {"linear_3d", "linear_no_bias", "conv1d", "conv2d", "conv3d", "gpt2_conv1d"}
    ],
)
def test_a_merged_graft_is_what_it_was_beside_the_host(slug: str, kind: str) -> None:
    subject = make_subject(kind)
    model, x = subject.model.eval(), subject.x
    receipt = apply_graft(model, subject.info, blueprints.get_blueprint(slug))
    with torch.no_grad():
        for parameter in receipt.graft.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        expected = model(x)
        receipt.undo(hard=False)
        assert not torch.allclose(model(x), expected, atol=1e-4)
        receipt.graft.merge(subject.host)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


def test_only_these_kinds_add_nothing_to_train() -> None:
    silent = {slug for slug in SLUGS if not blueprints.get_blueprint(slug).trainable}
    assert silent >= {"clamp_grad_norm", "kv_cache_8bit", "mon_act_stats"}
    for slug in silent:
        graft = blueprints.get_blueprint(slug).build(described(home_of(slug)), seed=0)
        assert not list(graft.parameters())
