"""On which device the tests marked ``cuda`` run."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("ESPER_TEST_DEVICE", "cuda")
IS_GPU = DEVICE.startswith("cuda")
needs_device = pytest.mark.skipif(
    IS_GPU and not torch.cuda.is_available(),
    reason="torch finds no CUDA device; ESPER_TEST_DEVICE=cpu runs this on the CPU",
)
needs_gpu = pytest.mark.skipif(
    not (IS_GPU and torch.cuda.is_available()), reason="it asks what a GPU does"
)
