"""The commands of docs/how-to/operate.md, in their order, on an installation of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hosts.paths import ROOT
from tests.docs.pages import DOCS, commands

PAGE = DOCS / "how-to" / "operate.md"
ENDLESS = ["up"]  # tests/launcher/test_up.py runs it


@pytest.mark.process
@pytest.mark.timeout(1500)
def test_the_steps_of_the_operations_guide_work_as_written(tmp_path: Path) -> None:
    environment = {**os.environ, "ESPER_DATA_DIR": str(tmp_path / "data")}
    for variable in ("DJANGO_SETTINGS_MODULE", "DATABASE_URL", "REDIS_URL"):
        environment.pop(variable, None)
    environment["PYTHONPATH"] = str(ROOT)
    steps = [words[1:] for words in commands(PAGE) if words[0] == "esper"]
    assert ["restore", "esper.backup"] in steps
    for words in steps:
        if words == ENDLESS:
            continue
        answer = subprocess.run(
            [sys.executable, "-m", "launcher", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert answer.returncode == 0, f"{words}: {answer.stdout}{answer.stderr}"
        assert "Traceback" not in answer.stderr
