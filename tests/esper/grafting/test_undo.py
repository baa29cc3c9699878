"""A hard undo brings back the run as it was: weights, optimizer, scheduler, random streams."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from torch import nn

from esper import blueprints
from esper.contracts import LayerInfo
from esper.exceptions import UndoError
from esper.grafting import (
    Receipt,
    Snapshot,
    SnapshotMemory,
    apply_graft,
    audit,
    companions_of,
    digest,
    slot_of,
    trace_layers,
)
from tests.esper.tiny_models import (
    IN_LAYERS,
    Training,
    make_training,
    meet_requirements,
    surroundings_of,
)

# kv_cache_8bit sits on a decoder of transformers: tests/matrix takes it out of those.
SLUGS = [slug for slug in IN_LAYERS if slug != "kv_cache_8bit"]
TARGET = "blocks.0.wide"
NORM = "blocks.0.norm"  # for what fits nothing else


def layers_of(training: Training) -> dict[str, LayerInfo]:
    tokens = training.batches[0][:, :-1]
    return {i.name: i for i in trace_layers(training.model, lambda: training.model(tokens))}


def graft_into(training: Training, layer: str, slug: str) -> Receipt:
    place, blueprint = layers_of(training)[layer], blueprints.get_blueprint(slug)
    surroundings = surroundings_of(training)
    needed = meet_requirements(training.model, place, blueprint, surroundings)
    receipt = apply_graft(training.model, place, blueprint, surroundings=surroundings)
    return needed[0] if needed else receipt  # the oldest: its undo takes all of them along


@pytest.mark.parametrize("scheduler", ["one_cycle", "lambda"])
@pytest.mark.parametrize("slug", SLUGS)
def test_after_a_hard_undo_the_next_20_losses_are_those_without_the_graft(
    slug: str, scheduler: str
) -> None:
    unchanged = make_training(scheduler)
    unchanged.run(6)
    torch_stream = torch.get_rng_state()
    expected = unchanged.run(20)
    grafted = make_training(scheduler)
    grafted.run(6)
    assert torch.equal(torch.get_rng_state(), torch_stream)
    receipt = graft_into(grafted, NORM if slug == "ln_rms" else TARGET, slug)
    grafted.run(7)
    grafted.steps -= 7  # the data cursor is the user's own

    undone = receipt.undo()

    assert undone.exact
    assert undone.digest == receipt.digest_before
    assert grafted.run(20) == expected
    assert digest(grafted.model) == digest(unchanged.model)


def test_a_graft_changes_no_loss_of_its_first_step() -> None:
    plain = make_training()
    plain.run(3)
    expected = plain.step()
    grafted = make_training()
    grafted.run(3)
    for slug in ("proj_lora_64", "proj_ia3", "mlp_gelu_2048", "attn_std", "mon_act_stats"):
        graft_into(grafted, TARGET, slug)
    assert grafted.step() == expected


def test_python_and_numpy_streams_come_back_too() -> None:
    training = make_training()
    random.seed(1)
    numpy.random.seed(1)
    receipt = graft_into(training, TARGET, "proj_ia3")
    expected = random.random(), numpy.random.random()
    receipt.undo()
    assert (random.random(), numpy.random.random()) == expected


def test_optimizer_and_scheduler_stand_as_before() -> None:
    training = make_training("lambda")
    training.run(3)
    groups = [dict(group) for group in training.optimizer.param_groups]
    lambdas = list(training.scheduler.lr_lambdas)
    parameters = list(training.model.parameters())
    receipt = graft_into(training, TARGET, "mlp_gelu_2048")
    training.run(4)
    assert [dict(group) for group in training.optimizer.param_groups] != groups  # the rate moves
    assert len(companions_of(training.optimizer)) == 1
    receipt.undo()
    assert [dict(group) for group in training.optimizer.param_groups] == groups
    assert training.scheduler.lr_lambdas == lambdas
    assert all(a is b for a, b in zip(training.model.parameters(), parameters, strict=True))
    assert len(training.optimizer.state) == len(parameters)
    assert companions_of(training.optimizer) == ()
    assert audit(training.model, [training.optimizer]) == []


def test_a_soft_undo_keeps_what_the_host_has_learnt() -> None:
    training = make_training()
    training.run(3)
    receipt = graft_into(training, TARGET, "mlp_gelu_2048")
    training.run(5)
    learnt = training.model.blocks[0].wide.weight.detach().clone()
    names = [name for name, _ in training.model.named_parameters() if ".esper." not in name]
    undone = receipt.undo(hard=False)
    assert not undone.hard
    assert not undone.exact
    assert undone.digest == digest(training.model)
    assert torch.equal(training.model.blocks[0].wide.weight, learnt)
    assert [name for name, _ in training.model.named_parameters()] == names
    assert audit(training.model, [training.optimizer]) == []
    training.run(3)


def test_a_hard_undo_takes_later_grafts_along_and_says_so() -> None:
    training = make_training()
    training.run(2)
    older = graft_into(training, TARGET, "proj_lora_64")
    training.run(2)
    newer = graft_into(training, "blocks.1.narrow", "mlp_gelu_2048")
    same_layer = graft_into(training, TARGET, "proj_ia3")
    training.run(2)
    undone = older.undo()
    assert undone.exact
    assert set(undone.discarded) == {"blocks.1.narrow/mlp_gelu_2048", f"{TARGET}/proj_ia3"}
    assert not newer.present
    assert not same_layer.present
    assert companions_of(training.optimizer) == ()
    with pytest.raises(UndoError, match="not in"):
        newer.undo()
    training.run(2)


def test_a_graft_that_was_taken_out_stays_out_when_a_later_one_is_undone() -> None:
    training = make_training()
    older = graft_into(training, TARGET, "proj_lora_64")
    newer = graft_into(training, "blocks.1.narrow", "proj_ia3")
    older.undo(hard=False)
    undone = newer.undo()
    assert not undone.exact
    assert not older.present
    assert not newer.present
    assert companions_of(training.optimizer) == ()
    assert audit(training.model, [training.optimizer]) == []
    training.run(2)


def test_without_its_snapshot_only_a_soft_undo_is_possible() -> None:
    training = make_training()
    receipt = graft_into(training, TARGET, "proj_ia3")
    before = receipt.digest_before
    receipt.forget_snapshot()
    assert not receipt.can_undo_hard
    assert receipt.digest_before == before
    with pytest.raises(UndoError, match="soft undo"):
        receipt.undo()
    receipt.undo(hard=False)
    assert digest(training.model) == before
    with pytest.raises(UndoError):
        receipt.undo(hard=False)


def test_the_digests_are_those_of_the_model_then_whenever_they_are_asked_for() -> None:
    training = make_training()
    training.run(2)
    before = digest(training.model)
    receipt = graft_into(training, TARGET, "mlp_gelu_2048")
    after = digest(training.model)
    training.run(2)
    assert (receipt.digest_before, receipt.digest_after) == (before, after)
    assert before != after


def test_batch_norm_buffers_and_accumulated_gradients_come_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    x = torch.randn(8, 6)
    model(x).sum().backward()
    gradient = model[0].weight.grad.clone()
    info = next(i for i in trace_layers(model, lambda: model(x)) if i.name == "1")
    before = digest(model)
    receipt = apply_graft(model, info, blueprints.get_blueprint("mlp_gelu_2048"), x=x)
    assert torch.equal(model[0].weight.grad, gradient)
    model(x).sum().backward()
    assert not torch.equal(model[0].weight.grad, gradient)
    receipt.undo()
    assert digest(model) == before
    assert torch.equal(model[0].weight.grad, gradient)


def test_tied_weights_stay_tied() -> None:
    training = make_training()
    receipt = graft_into(training, "head", "proj_lora_64")
    training.run(3)
    receipt.undo()
    assert training.model.head.weight is training.model.embed.weight
    assert training.optimizer.state[training.model.head.weight] is not None


def test_the_gradient_clamp_removes_its_hooks_when_it_is_removed() -> None:
    training = make_training()
    receipt = graft_into(training, TARGET, "clamp_grad_norm")
    training.step()
    weight = training.model.blocks[0].wide.weight
    assert weight._post_accumulate_grad_hooks
    receipt.undo()
    assert not weight._post_accumulate_grad_hooks
    assert slot_of(training.model.blocks[0].wide) is None


def test_a_snapshot_in_reserved_memory_brings_back_the_same_bits() -> None:
    training = make_training()
    training.run(2)
    surroundings = surroundings_of(training)
    memory = SnapshotMemory.reserve(training.model, [training.optimizer])
    plain = Snapshot.take(training.model, surroundings)
    reserved = Snapshot.take(training.model, surroundings, memory)
    before = digest(training.model)
    training.run(3)
    assert plain.differences()
    reserved.restore()
    assert digest(training.model) == before
    assert plain.differences() == []
    again = Snapshot.take(training.model, surroundings, memory)  # used up: fresh copies
    training.run(1)
    again.restore()
    assert plain.differences() == []
    reserved.restore()
    assert plain.differences() == [], "the two snapshots share no memory"
