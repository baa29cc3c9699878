"""Esper in a loop that Accelerate runs."""

from __future__ import annotations

import os
from pathlib import Path

from esper.grafting import digest
from tests.another_python import python
from tests.esper.sdk.frameworks.accelerate_training import GRAFT_AT, STEPS, train


def test_a_loop_is_stepped_grafted_saved_and_goes_on_in_a_new_process(tmp_path: Path) -> None:
    net, session = train(tmp_path)
    assert [entry.step for entry in session.adaptations] == [GRAFT_AT, GRAFT_AT]
    assert session.state_dict()["step"] == STEPS
    assert session.findings() == []
    module = "tests.esper.sdk.frameworks.accelerate_training"
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = python("-m", module, str(tmp_path), environment=one_thread)
    expected = f"['proj_lora_64', 'ln_rms'] {digest(net)}"
    assert answer.stdout.strip() == expected, answer.stderr
