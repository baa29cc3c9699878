"""Lets a torchvision load beside a torch that it was not built for.

The index's wheel links CUDA and its compiled operators do not load beside a CPU build of torch.
Its import then fails over two operators for detection boxes, which no model here calls, and
transformers, which imports it where it is installed, fails with it.
"""

from __future__ import annotations

import importlib.util

import torch

_DECLARED: list[torch.library.Library] = []  # an operator lives as long as its library object


def declare_missing_operators() -> None:
    """Declares the two operators without an implementation, where they are needed and missing."""
    if _DECLARED or importlib.util.find_spec("torchvision") is None or _loads():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)


def _loads() -> bool:
    folder = importlib.util.find_spec("torchvision")
    assert folder is not None
    for place in folder.submodule_search_locations or ():
        try:
            torch.ops.load_library(f"{place}/_C.so")
        except OSError:
            return False
    return True
