"""What a script's own variables hold: the objects that its next lines can look up.

The garbage collector knows neither the local variables of a running function nor a dict of plain
numbers, such as rates by the parameters' names, so both are read from the frames that call Esper.
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator
from types import CellType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

MOST_OBJECTS = 10_000  # that are looked at, in some 10 ms
LARGEST = 1024  # entries of a container that is looked into: a longer one is data
DEEPEST = 5  # such as trainer.model.__dict__.average.__dict__
CONTAINERS = (dict, list, tuple, set, OrderedDict, deque, CellType, MethodType)
SIZED = (dict, list, tuple, set, OrderedDict, deque)
HOLDERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # whose children may be the script's
OTHERS = ("torch.", "esper.", "numpy.", "builtins.", "importlib.", "_frozen_importlib")
REFERENCES = 3  # to the dict of a frame's variables: its own, ours, and the question's


def script_objects() -> Iterator[Any]:
    """Containers and instances that the calling frames reach, the nearest frame first."""
    known: set[int] = set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(known) < MOST_OBJECTS:
        name = f"{frame.f_globals.get('__name__', '')}."
        if not name.startswith(OTHERS):
            yield from _reached([*_variables(frame), frame.f_globals], known)
        frame = frame.f_back


def _variables(frame: FrameType) -> list[Any]:
    found: Any = frame.f_locals
    values = list(found.values())
    if (
        frame.f_code.co_flags & inspect.CO_OPTIMIZED
        and type(found) is dict
        and sys.getrefcount(found) == REFERENCES
    ):
        # Before Python 3.13 the frame keeps this dict, and with it what the script has let go.
        found.clear()
    return values


def _reached(level: list[Any], known: set[int]) -> Iterator[Any]:
    for _ in range(DEEPEST):
        below: list[Any] = []
        for found in level:
            if id(found) in known or not _is_looked_into(found):
                continue
            known.add(id(found))
            yield found
            below += _held_by(found)
            if len(known) >= MOST_OBJECTS:
                return
        level = below


def _is_looked_into(found: Any) -> bool:
    kind = type(found)
    if issubclass(kind, FunctionType):
        return found.__closure__ is not None
    if issubclass(kind, CONTAINERS):
        return True
    if issubclass(kind, ModuleType | Tensor):
        return False
    if issubclass(kind, type):  # a configuration may be a class
        kind = found
    return issubclass(kind, HOLDERS) or not f"{kind.__module__}.".startswith(OTHERS)


def _held_by(found: Any) -> list[Any]:
    if issubclass(type(found), FunctionType):
        return list(found.__closure__)
    if type(found) in SIZED and len(found) > LARGEST:
        return []
    return gc.get_referents(found)
