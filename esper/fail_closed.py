"""Code of Esper that runs inside the user's program never raises there.

A hook, a watcher, a callback of a framework or an exit handler is wrapped once, where it is
installed. An exception of it stays inside; the part is switched off for its layer, which means that
it is not called again, and one :class:`Failure` says what is not measured from then on, and why.

An exception that a signal handler of the script raises is the script's own, such as a time limit,
and goes through.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from types import CodeType
from typing import Any

logger = logging.getLogger("esper")

_LONGEST_ERROR = 200  # characters; some of torch's errors list every backend


@dataclass(frozen=True, slots=True)
class Failure:
    """A part of Esper that was switched off.

    Attributes:
        part: what failed, such as ``"activation watcher"``.
        layer: where; empty for the whole run.
        unmeasured: what Esper does not know, or do, from now on.
        error: kind and text of the exception, shortened.
    """

    part: str
    layer: str
    unmeasured: str
    error: str


class FailClosed:
    """Wraps what Esper installs in one user's program.

    Args:
        report: called once for each part and layer that is switched off; an error of its own is
            ignored. None where nobody listens: then it is logged.
    """

    def __init__(self, report: Callable[[Failure], object] | None = None) -> None:
        self._report = report
        self._off: set[tuple[str, str]] = set()

    def wrap(
        self, call: Callable[..., Any], *, part: str, layer: str = "", unmeasured: str
    ) -> Callable[..., Any]:
        """``call``, which returns None when it fails, and after it has failed."""

        def closed(*args: Any, **kwargs: Any) -> Any:
            if (part, layer) in self._off:
                return None
            try:
                return call(*args, **kwargs)
            except Exception as error:
                if is_the_scripts(error):
                    raise
                self.switch_off(error, part=part, layer=layer, unmeasured=unmeasured)
                return None

        return closed

    def run(self, work: Callable[[], Any], *, part: str, layer: str = "", unmeasured: str) -> Any:
        """The result of ``work``, None when it fails or has failed before."""
        return self.wrap(work, part=part, layer=layer, unmeasured=unmeasured)()

    def is_off(self, part: str, layer: str = "") -> bool:
        """The part has failed there."""
        return (part, layer) in self._off

    def switch_off(
        self, error: BaseException, *, part: str, layer: str = "", unmeasured: str
    ) -> None:
        """Reports a part that failed; a second report of the same part and layer is dropped."""
        if (part, layer) in self._off:
            return
        self._off.add((part, layer))
        logger.debug("Esper's %s failed at %r", part, layer, exc_info=error)
        failure = Failure(part, layer, unmeasured, short(error))
        if self._report is None:
            logger.warning("%s: %s. %s", layer or "the run", failure.error, unmeasured)
            return
        with errors_ignored():
            self._report(failure)


def contained(part: str, unmeasured: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a hook that is a function of a module, so that pickle and copies find it by name.

    Its errors are logged, the first one only.
    """

    def decorate(hook: Callable[..., Any]) -> Callable[..., Any]:
        known = FailClosed()

        @wraps(hook)
        def inside(*args: Any, **kwargs: Any) -> Any:
            try:
                return hook(*args, **kwargs)
            except Exception as error:
                if is_the_scripts(error):
                    raise
                known.switch_off(error, part=part, unmeasured=unmeasured)
                return None

        return inside

    return decorate


@contextmanager
def errors_ignored() -> Iterator[None]:
    """As ``suppress(Exception)``, but the script's own exceptions go through."""
    try:
        yield
    except Exception as error:
        if is_the_scripts(error):
            raise


def is_the_scripts(error: BaseException) -> bool:
    """A signal handler raised it, while code of Esper happened to run."""
    handlers, traceback = set(_code_of_handlers()), error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code in handlers:
            return True
        traceback = traceback.tb_next
    return False


def _code_of_handlers() -> Iterator[CodeType]:
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        while isinstance(handler, partial):
            handler = handler.func
        # A function and a bound method have it themselves, another callable its class.
        for held in (handler, getattr(type(handler), "__call__", None)):  # noqa: B004
            if isinstance(code := getattr(held, "__code__", None), CodeType):
                yield code


def short(error: BaseException) -> str:
    """Kind and first line of an exception."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:_LONGEST_ERROR].rstrip(": ")
