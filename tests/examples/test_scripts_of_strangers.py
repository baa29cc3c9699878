"""Example scripts that take no special care of Esper run to their end, and say what they did."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def output_of(script: str, *options: str) -> tuple[str, str]:
    """(stdout, stderr) of a script that ends well."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("ESPER_SERVER", "ESPER_TOKEN", "ESPER_VERBOSE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "examples" / script), *options],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


def number_after(words: str, text: str) -> str:
    found = re.search(rf"{words} (\d+(\.\d+)?(e[-+]\d+)?)", text)
    assert found is not None, text
    return found[1]


# The best epoch is before the graft, and after it.
@pytest.mark.parametrize(("graft_at", "is_older"), [(26, True), (3, False)])
def test_early_stopping_gets_its_best_state_back(graft_at: int, is_older: bool) -> None:
    told, said = output_of(
        "early_stopping.py", "--epochs", "30", "--patience", "30", "--graft-at", str(graft_at)
    )
    assert f"proj_lora_64 in '0' at step {19 * graft_at}" in told
    assert (int(number_after("best epoch", told)) < graft_at) is is_older
    best = number_after("best epoch [0-9]+, validation loss", told)
    assert number_after("loaded again: validation loss", told) == best
    taken_out = "took proj_lora_64 out of '0': the script loaded a state" in said
    assert taken_out is is_older
    assert "finding" not in said


@pytest.mark.parametrize(("graft_at", "is_older"), [(50, True), (5, False)])
def test_the_trainer_loads_its_best_model_across_a_graft(graft_at: int, is_older: bool) -> None:
    pytest.importorskip("transformers")
    told, said = output_of(
        "huggingface_best_model.py", "--steps", "80", "--graft-at", str(graft_at)
    )
    assert f"at step {graft_at}" in told
    assert (int(number_after("best checkpoint", told)) < graft_at) is is_older
    assert number_after("loaded again: loss", told) == number_after("best loss", told)
    assert "esper: attached 'best-model'" in said


# The graft is the script's own in both modes.
@pytest.mark.parametrize("mode", ["observe", pytest.param("supervised", marks=pytest.mark.full)])
def test_a_whole_graph_trains_on_through_a_graft(mode: str) -> None:
    told, said = output_of("compiled_loop.py", "--steps", "60", "--graft-at", "30", "--mode", mode)
    assert "mlp_gelu_2048 in '2' at step 30" in told
    assert float(number_after("without compilation:", told)) < 1e-4
    assert float(number_after("accuracy", told)) > 0.5
    assert "finding" not in said
