"""The commands of docs/how-to/operate.md, in their order, on an installation of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.another_python import esper
from tests.docs.pages import DOCS, commands

PAGE = DOCS / "how-to" / "operate.md"
ENDLESS = ["up"]  # tests/launcher/test_up.py runs it


@pytest.mark.process
@pytest.mark.timeout(1500)
def test_the_steps_of_the_operations_guide_work_as_written(tmp_path: Path) -> None:
    environment = {**os.environ, "ESPER_DATA_DIR": str(tmp_path / "data")}
    for variable in ("DJANGO_SETTINGS_MODULE", "DATABASE_URL", "REDIS_URL"):
        environment.pop(variable, None)
    steps = [words[1:] for words in commands(PAGE) if words[0] == "esper"]
    assert ["restore", "esper.backup"] in steps
    for words in steps:
        if words == ENDLESS:
            continue
        answer = esper(*words, cwd=tmp_path, environment=environment)
        assert answer.returncode == 0, f"{words}: {answer.stdout}{answer.stderr}"
        assert "Traceback" not in answer.stderr
