"""The service decides and grafts nothing itself: it does not load torch's compiler."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import esper.services.tamiyo.enhanced_main
print("torch._dynamo" in sys.modules)
"""


def test_the_service_starts_without_torch_s_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
