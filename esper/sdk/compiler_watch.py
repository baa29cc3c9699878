"""What torch.compile does to a run, where it concerns Esper.

A slot hides its hook from the compiler, so a graft, an undo and a new α cost no recompilation. The
price is that each slot splits the graph: layers of one class are then compiled as one function,
once for each different layer, up to torch's limit. So there are two things to watch: code that may
not be split (``fullgraph=True``), and a compiler that gave up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch._dynamo import convert_frame
from torch._dynamo.utils import counters

from esper.contracts import Finding, Severity, ViolationRule

_GAVE_UP = "Dynamo recompile limit exceeded"


class CompilerWatch:
    """Counts recompilations since it was made, and notices when the compiler gives up."""

    def __init__(self) -> None:
        self._known = set(_limits_hit())
        self._last = _recompilations()
        self._recompiles = 0

    def recompiles(self) -> int:
        """How often code was compiled again in this process since the watch began."""
        now = _recompilations()
        # The compiler's own counter starts anew when somebody resets it.
        self._recompiles += now - self._last if now >= self._last else now
        self._last = now
        return self._recompiles

    def finding(self) -> Finding | None:
        """One for each time that a part of the run fell back to eager."""
        fresh = set(_limits_hit()) - self._known
        self._known |= fresh
        if not fresh:
            return None
        return Finding(
            rule=ViolationRule.LATENCY,
            layer="",
            severity=Severity.SERIOUS,
            observed=(
                "torch.compile gave up on a part of the run after too many recompilations; "
                "it runs eagerly from now on"
            ),
            limit="torch._dynamo.config.recompile_limit",
            remedy=(
                "TORCH_LOGS=recompiles tells what changed. Where it is the layers' shapes: slots "
                "split the graph, so layers of one class share one limit; raise "
                "torch._dynamo.config.recompile_limit, or name fewer slots to attach."
            ),
        )


def whole_graph_region(model: nn.Module, layer: str) -> str | None:
    """Name of the module around ``layer`` that is compiled with ``fullgraph=True``, if one is.

    No slot may be in there: each one splits the graph.
    """
    parts = layer.split(".") if layer else []
    names = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
    return next((n for n in names if _is_whole_graph(model.get_submodule(n))), None)


def is_whole_graph(compiled: Any) -> bool:
    """True for what ``torch.compile(…, fullgraph=True)`` gives back for a module."""
    return bool(getattr(getattr(compiled, "dynamo_ctx", None), "fullgraph", False))


def _is_whole_graph(module: nn.Module) -> bool:
    """True after ``module.compile(fullgraph=True)``: torch keeps the setting in a closure only."""
    cells = getattr(module._compiled_call_impl, "__closure__", None) or ()
    return any(getattr(cell.cell_contents, "fullgraph", None) is True for cell in cells)


def _recompilations() -> int:
    return sum(count - 1 for count in convert_frame.FRAME_COMPILE_COUNTER.values())


def _limits_hit() -> Iterator[str]:
    return (reason for reason in counters["unimplemented"] if reason.startswith(_GAVE_UP))
