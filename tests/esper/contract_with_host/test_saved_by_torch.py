"""D6 in torch itself and safetensors: whole models, distributed checkpoints, optimizers."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import esper
from tests.esper.contract_with_host.saved_models import GRAFTS, MODELS, Run, computed, fresh

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("kind", MODELS)
def test_a_whole_model_is_pickled_with_its_grafts(kind: str) -> None:
    run = Run(kind)
    for layer, slug in GRAFTS[kind]:
        run.graft(layer, slug)
    kept = io.BytesIO()
    torch.save(run.model, kept)
    kept.seek(0)
    loaded = torch.load(kept, weights_only=False)

    assert torch.equal(computed(loaded, kind), computed(run.model, kind))
    before = copy.deepcopy(run.model.state_dict())
    run.train(2)
    loaded.load_state_dict(run.model.state_dict())
    assert torch.equal(computed(loaded, kind), computed(run.model, kind))
    loaded.load_state_dict(before)
    run.session.close()


def test_a_whole_model_with_a_graft_says_that_it_needs_esper(tmp_path: Path) -> None:
    run = Run("mlp")
    run.graft("0", "proj_lora_64")
    torch.save(run.model, tmp_path / "grafted.pt")
    torch.save(esper.export(run.model), tmp_path / "exported.pt")
    program = (
        "import sys; sys.modules['esper'] = None; import torch\n"
        "for name in sys.argv[1:]: print(type(torch.load(name, weights_only=False)), flush=True)"
    )

    failed = subprocess.run(
        [sys.executable, "-c", program, "exported.pt", "grafted.pt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    [loaded] = failed.stdout.splitlines()
    assert "Sequential" in loaded
    assert failed.returncode != 0
    assert "esper" in failed.stderr.splitlines()[-1]
    run.session.close()


@pytest.mark.parametrize("kind", MODELS)
def test_safetensors_saves_and_loads_models(tmp_path: Path, kind: str) -> None:
    run, file = Run(kind), str(tmp_path / "before")
    save_model(run.model, file)
    before = computed(run.model, kind)
    for layer, slug in GRAFTS[kind]:
        run.graft(layer, slug)
    grafted = str(tmp_path / "with")
    save_model(run.model, grafted)
    after = computed(run.model, kind)
    run.train(1)

    for name, expected in ((grafted, after), (file, before), (grafted, after)):
        load_model(run.model, name)
        assert torch.equal(computed(run.model, kind), expected)
    with pytest.raises(RuntimeError, match="load_with_esper_load_state_dict"):
        load_model(fresh(kind), grafted)
    run.session.close()


@pytest.fixture
def alone() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("by", ["state_dict", "get_model_state_dict"])
def test_distributed_checkpoints(tmp_path: Path, by: str) -> None:
    run = Run("mlp")

    def states(model: nn.Module) -> dict[str, Any]:
        state = get_model_state_dict(model) if by == "get_model_state_dict" else model.state_dict()
        return {"model": state}

    def load(model: nn.Module, name: str) -> None:
        state = states(model)
        dcp.load(state, checkpoint_id=tmp_path / name)
        if by == "get_model_state_dict":
            set_model_state_dict(model, state["model"])
        else:
            model.load_state_dict(state["model"])

    dcp.save(states(run.model), checkpoint_id=tmp_path / "before")
    before = computed(run.model, "mlp")
    run.graft("0", "mlp_gelu_2048")
    dcp.save(states(run.model), checkpoint_id=tmp_path / "with")
    expected = computed(run.model, "mlp")
    run.train(2)

    load(run.model, "with")
    assert torch.equal(computed(run.model, "mlp"), expected)
    with pytest.raises(CheckpointException, match="load_with_esper_load_state_dict"):
        load(run.model, "before")
    watched = fresh("mlp")
    esper.attach(watched, torch.optim.AdamW(watched.parameters()), verbose=False)
    for model in (watched, fresh("mlp")):  # it reads the names alone that the model has
        with pytest.raises(CheckpointException, match=r"grafts at model\.0 .* convert it by"):
            load(model, "with")
    # Here the names come from the checkpoint, not the model.
    for model in (run.model, watched, fresh("mlp")):
        esper.load_state_dict(model, whole(tmp_path / "with"))
        assert torch.equal(computed(model, "mlp"), expected)
    run.model.load_state_dict(whole(tmp_path / "before"))
    assert torch.equal(computed(run.model, "mlp"), before)
    run.session.close()


def whole(folder: Path) -> dict[str, Any]:
    """All of a distributed checkpoint, whatever its names."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder, folder / "whole.pt")
    state: dict[str, Any] = torch.load(folder / "whole.pt", weights_only=True)["model"]
    return state


@pytest.mark.parametrize("undone", [False, True], ids=["grafted", "undone"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_optimizers_state_is_loaded_across_a_graft(kind: str, undone: bool) -> None:
    run = Run(kind)
    model, optimizer = (
        copy.deepcopy(run.model.state_dict()),
        copy.deepcopy(run.optimizer.state_dict()),
    )
    receipt = run.graft(*GRAFTS[kind][0])
    later = copy.deepcopy(run.optimizer.state_dict())
    if undone:
        run.session.undo(receipt, hard=False)
    run.optimizer.load_state_dict(later)
    run.train(2)

    run.model.load_state_dict(model)
    run.optimizer.load_state_dict(optimizer)
    again = run.optimizer.state_dict()
    assert again["param_groups"] == optimizer["param_groups"]
    for place, held in optimizer["state"].items():
        assert all(torch.equal(value, again["state"][place][key]) for key, value in held.items())
    run.train(2)
    run.session.close()
