"""The web process never imports torch."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import sys
import esper_web.asgi
from django.urls import get_resolver
for pattern in get_resolver().url_patterns:
    getattr(pattern, "url_patterns", None)
heavy = sorted({"torch", "torchvision", "safetensors"} & set(sys.modules))
print(heavy)
"""


def test_the_whole_asgi_application_loads_without_torch() -> None:
    environment = os.environ | {"DJANGO_SETTINGS_MODULE": "esper_web.settings.test"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
        env=environment,
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"
