"""What torch.compile does to a run, where it concerns Esper.

A graft in compiled code costs one recompilation, an undo and a new α cost none. So a compiler that
compiles often, or gave up, has another reason, which the run should know.
"""

from __future__ import annotations

from collections.abc import Iterator

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
                "TORCH_LOGS=recompiles tells what changed. Where it is the layers' shapes, raise "
                "torch._dynamo.config.recompile_limit. Where it is a graft in one of many blocks "
                "that are compiled one by one, raise it by one for each different block."
            ),
        )


def _recompilations() -> int:
    return sum(count - 1 for count in convert_frame.FRAME_COMPILE_COUNTER.values())


def _limits_hit() -> Iterator[str]:
    return (reason for reason in counters["unimplemented"] if reason.startswith(_GAVE_UP))
