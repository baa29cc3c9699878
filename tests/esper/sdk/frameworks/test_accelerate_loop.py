"""Esper in a loop that Accelerate runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from esper.grafting import digest
from tests.esper.sdk.frameworks.accelerate_training import GRAFT_AT, STEPS, train


def test_a_loop_is_stepped_grafted_saved_and_goes_on_in_a_new_process(tmp_path: Path) -> None:
    net, session = train(tmp_path)
    assert [entry.step for entry in session.adaptations] == [GRAFT_AT, GRAFT_AT]
    assert session.state_dict()["step"] == STEPS
    assert session.findings() == []
    answer = subprocess.run(
        [sys.executable, "-m", "tests.esper.sdk.frameworks.accelerate_training", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=Path(__file__).parents[4],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[4]), "OMP_NUM_THREADS": "1"},
    )
    expected = f"['proj_lora_64', 'ln_rms'] {digest(net)}"
    assert answer.stdout.strip() == expected, answer.stderr
