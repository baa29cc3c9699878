"""A run with grafts is saved and goes on in a new process."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch

from esper import blueprints
from esper.exceptions import ConfigurationError
from esper.grafting import (
    Surroundings,
    apply_graft,
    audit,
    companion_states_by_name,
    digest,
    load_companion_states_by_name,
    load_optimizer_state_by_name,
    optimizer_state_by_name,
    rebuild,
    structure,
    trace_layers,
)
from tests.esper.tiny_models import Training, make_training


def grafted_training() -> Training:
    training = make_training("none")
    training.run(3)
    tokens = training.batches[0][:, :-1]
    infos = {i.name: i for i in trace_layers(training.model, lambda: training.model(tokens))}
    for number, (layer, slug) in enumerate(
        [("blocks.0.wide", "mlp_gelu_2048"), ("blocks.1.norm", "proj_ia3"),
         ("blocks.0.wide", "proj_lora_64"), ("head", "mon_act_stats")]
    ):  # fmt: skip
        apply_graft(
            training.model,
            infos[layer],
            blueprints.get_blueprint(slug),
            surroundings=Surroundings([training.optimizer]),
            seed=number,
            adaptation=f"a{number}",
            step=number,
        )
    training.run(3)
    return training


def test_a_run_goes_on_to_the_bit_from_its_checkpoint() -> None:
    training = grafted_training()
    buffer = io.BytesIO()
    torch.save(
        {
            "structure": structure(training.model),
            "model": training.model.state_dict(),
            "optimizer": optimizer_state_by_name(training.model, training.optimizer),
            "companions": companion_states_by_name(training.model, training.optimizer),
        },
        buffer,
    )
    saved_digest = digest(training.model)
    torch.manual_seed(99)
    expected = training.run(8)

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed = make_training("none")
    receipts = rebuild(resumed.model, saved["structure"], Surroundings([resumed.optimizer]))
    resumed.model.load_state_dict(saved["model"])
    load_optimizer_state_by_name(resumed.model, resumed.optimizer, saved["optimizer"])
    load_companion_states_by_name(resumed.model, resumed.optimizer, saved["companions"])
    resumed.steps = 6
    assert digest(resumed.model) == saved_digest
    assert audit(resumed.model, [resumed.optimizer]) == []
    torch.manual_seed(99)
    assert resumed.run(8) == expected
    assert [receipt.adaptation for receipt in receipts] == ["a0", "a2", "a1", "a3"]
    assert receipts[0].undo(hard=False).digest != saved_digest


def test_a_manifest_is_json_and_comes_back_the_same() -> None:
    training = grafted_training()
    manifest = structure(training.model)
    again = make_training("none")
    rebuild(again.model, json.loads(json.dumps(manifest)), Surroundings([again.optimizer]))
    assert structure(again.model) == manifest


def test_a_rebuilt_graft_starts_from_its_seed() -> None:
    first, second = make_training("none"), make_training("none")
    manifest = structure(grafted_training().model)
    rebuild(first.model, manifest)
    rebuild(second.model, manifest)
    assert digest(first.model) == digest(second.model)


def test_companions_may_stand_in_another_order() -> None:
    training = grafted_training()
    saved = copy.deepcopy(companion_states_by_name(training.model, training.optimizer))
    training.run(2)
    assert companion_states_by_name(training.model, training.optimizer) != saved
    load_companion_states_by_name(training.model, training.optimizer, saved[::-1])
    again = companion_states_by_name(training.model, training.optimizer)
    assert [state["groups"] for state in again] == [state["groups"] for state in saved]


def test_state_of_other_groups_is_refused_and_nothing_is_lost() -> None:
    plain = make_training("none")
    plain.run(1)
    saved = optimizer_state_by_name(plain.model, plain.optimizer)
    saved["groups"] = [{**saved["groups"][0], "params": saved["groups"][0]["params"][1:]}]
    before = {key: dict(value) for key, value in plain.optimizer.state.items()}
    with pytest.raises(ConfigurationError, match="groups differ"):
        load_optimizer_state_by_name(plain.model, plain.optimizer, saved)
    assert {key: dict(value) for key, value in plain.optimizer.state.items()} == before


def test_companions_of_other_grafts_are_refused() -> None:
    training, plain = grafted_training(), make_training("none")
    saved = companion_states_by_name(training.model, training.optimizer)
    with pytest.raises(ConfigurationError, match="train other tensors"):
        load_companion_states_by_name(plain.model, plain.optimizer, saved)


def test_a_changed_blueprint_is_not_taken_silently() -> None:
    manifest = copy.deepcopy(structure(grafted_training().model))
    manifest[0]["version"] = "0" * 16
    training = make_training("none")
    before = digest(training.model)
    with pytest.raises(ConfigurationError, match="other_versions"):
        rebuild(training.model, manifest)
    assert digest(training.model) == before
    assert len(rebuild(training.model, manifest, other_versions=True)) == 4


@pytest.mark.parametrize("broken", [{}, {"layer": 3}, {"adaptation": "x", "layer": {}}])
def test_what_is_no_manifest_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises((ConfigurationError, ValueError)):
        rebuild(make_training("none").model, [broken])
