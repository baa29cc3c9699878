"""How a run ends: by the script, by a person, by an error, or with the interpreter."""

from __future__ import annotations

from esper.exceptions import EsperError

INTERRUPTED_SECONDS = 0.3


class RunStopped(EsperError):
    """A person stopped the run; raised by ``session.step`` at a step boundary."""


def reason_of(error: BaseException | None) -> str:
    """Why a run failed, as it is reported; empty where it did not fail."""
    return "" if error is None else str(error) or type(error).__name__


def patience_for(error: BaseException | None, seconds: float = 10.0) -> float:
    """How many seconds to wait for the server at the end; a person who interrupts waits for none.

    What is not sent then is in the journal, and the next session on this machine sends it.
    """
    return INTERRUPTED_SECONDS if isinstance(error, KeyboardInterrupt) else seconds
