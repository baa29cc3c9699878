"""The tutorial's last step, and the guide that decides by REST, against a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.docs.pages import DOCS, ROOT, blocks
from tests.running import RunningEsper

pytestmark = pytest.mark.process

OF_THE_TESTS = frozenset({"DJANGO_SETTINGS_MODULE", "DATABASE_URL", "REDIS_URL"})


def command(esper: RunningEsper, *words: str) -> str:
    """What ``esper WORDS`` prints for this installation."""
    done = subprocess.run(
        [sys.executable, "-m", "launcher", words[0], "--data-dir", str(esper.data_dir), *words[1:]],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in OF_THE_TESTS},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def get(esper: RunningEsper, path: str) -> Any:
    token = esper.keyring["people"]["olga"]["token"]
    headers = {"Authorization": f"Bearer {token}"}
    answer = httpx.get(f"{esper.url}/api/v1/{path}", headers=headers, timeout=600)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_tutorial_runs_with_a_server_when_its_addresses_are_removed(
    running_esper: RunningEsper, tmp_path: Path
) -> None:
    page = blocks(DOCS / "tutorial.md", "python")
    script = tmp_path / "first.py"
    code = "\n".join(block.code for block in page)
    assert code.count(', server=""') == 2
    script.write_text(code.replace(', server=""', ""), encoding="utf-8")
    token = command(running_esper, "token", "issue", "rafi", "--scope", "runs:create")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "ESPER_SERVER": running_esper.url,
            "ESPER_TOKEN": token,
            "ESPER_STATE_DIR": str(tmp_path / "state"),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    runs = [run for run in get(running_esper, "runs")["results"] if run["name"] == "tutorial"]
    assert runs
    assert {run["state"] for run in runs} == {"finished"}


@pytest.mark.skipif(not Path("/usr/bin/curl").exists(), reason="the guide's commands use curl")
def test_the_guides_list_of_what_waits_is_answered(running_esper: RunningEsper) -> None:
    shown = blocks(DOCS / "how-to" / "decide.md", "sh")
    listing = next(block for block in shown if "?state=awaiting_approval" in block.code)
    token = running_esper.keyring["people"]["olga"]["token"]
    done = subprocess.run(
        ["bash", "-c", listing.code.replace("curl ", "curl --fail --silent ")],
        env=os.environ | {"ESPER_SERVER": running_esper.url, "ESPER_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert '"results"' in done.stdout
