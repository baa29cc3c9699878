"""Example scripts that take no special care of Esper run to their end, and say what they did."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


END = "--- end of a run ---\n"
RUNS = f"""
import json, runpy, sys
_, script, runs = sys.argv
for options in json.loads(runs):
    sys.argv = [script, *options]
    runpy.run_path(script, run_name="__main__")
    for stream in (sys.stdout, sys.stderr):
        print({END.strip()!r}, file=stream, flush=True)
"""


@cache
def outputs_of(script: str, *runs: tuple[str, ...]) -> list[tuple[str, str]]:
    """(stdout, stderr) of each run of a script that ends well. One process: it imports torch."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("ESPER_SERVER", "ESPER_TOKEN", "ESPER_VERBOSE"):
        environment.pop(name, None)
    path = str(ROOT / "examples" / script)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUNS, path, json.dumps(runs)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told, said = done.stdout.split(END)[:-1], done.stderr.split(END)[:-1]
    return list(zip(told, said, strict=True))


def number_after(words: str, text: str) -> str:
    found = re.search(rf"{words} (\d+(\.\d+)?(e[-+]\d+)?)", text)
    assert found is not None, text
    return found[1]


# The best epoch is before the graft, and after it.
@pytest.mark.parametrize("is_older", [True, False])
def test_early_stopping_gets_its_best_state_back(is_older: bool) -> None:
    epochs = {True: 26, False: 3}
    always = ("--epochs", "30", "--patience", "30", "--graft-at")
    runs = [(*always, str(epoch)) for epoch in epochs.values()]
    told, said = outputs_of("early_stopping.py", *runs)[[*epochs].index(is_older)]
    graft_at = epochs[is_older]
    assert f"proj_lora_64 in '0' at step {19 * graft_at}" in told
    assert (int(number_after("best epoch", told)) < graft_at) is is_older
    best = number_after("best epoch [0-9]+, validation loss", told)
    assert number_after("loaded again: validation loss", told) == best
    taken_out = "took proj_lora_64 out of '0': the script loaded a state" in said
    assert taken_out is is_older
    assert "finding" not in said


@pytest.mark.parametrize("is_older", [True, False])
def test_the_trainer_loads_its_best_model_across_a_graft(is_older: bool) -> None:
    pytest.importorskip("transformers")
    steps = {True: 50, False: 5}
    runs = [("--steps", "80", "--graft-at", str(step)) for step in steps.values()]
    told, said = outputs_of("huggingface_best_model.py", *runs)[[*steps].index(is_older)]
    graft_at = steps[is_older]
    assert f"at step {graft_at}" in told
    assert (int(number_after("best checkpoint", told)) < graft_at) is is_older
    assert number_after("loaded again: loss", told) == number_after("best loss", told)
    assert "esper: attached 'best-model'" in said


# The graft is the script's own in both modes.
@pytest.mark.parametrize("mode", ["observe", pytest.param("supervised", marks=pytest.mark.full)])
def test_a_whole_graph_trains_on_through_a_graft(mode: str) -> None:
    options = ("--steps", "60", "--graft-at", "30", "--mode", mode)
    [(told, said)] = outputs_of("compiled_loop.py", options)
    assert "mlp_gelu_2048 in '2' at step 30" in told
    assert float(number_after("without compilation:", told)) < 1e-4
    assert float(number_after("accuracy", told)) > 0.5
    assert "finding" not in said
