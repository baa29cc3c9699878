"""A framework calls Esper in its own loop: nothing of Esper may end that loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from esper.fail_closed import FailClosed, is_the_scripts
from esper.sdk.ending import RunStopped
from esper.sdk.findings import unknown_loss
from esper.sdk.session import Session

logger = logging.getLogger("esper")


def inside_the_loop(
    unmeasured: str, *, raises: tuple[type[Exception], ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a callback's method: when it fails, it is switched off and the training goes on.

    The finding is in the callback's session; before there is one, it is logged.

    Args:
        unmeasured: what Esper does not do without this method.
        raises: errors that the arguments of the callback cause, which its user must see.
    """

    def decorate(method: Callable[..., None]) -> Callable[..., None]:
        part = method.__name__

        @wraps(method)
        def inside(self: Any, *args: Any, **kwargs: Any) -> None:
            closed = _fail_closed_of(self)
            if closed.is_off(part):
                return
            try:
                method(self, *args, **kwargs)
            except raises:
                raise
            except Exception as error:
                if is_the_scripts(error):
                    raise
                _fail_closed_of(self).switch_off(error, part=part, unmeasured=unmeasured)

        return inside

    return decorate


def goes_on(session: Session, loss: float | Tensor | None) -> bool:
    """One step of the session; False where the training must stop after it.

    A loss that the framework did not show is a finding.
    """
    if loss is None:
        session._parts.findings.add(unknown_loss())
    try:
        session.step(loss)
    except RunStopped as stopped:
        logger.warning("the run was stopped: %s", stopped)
        return False
    return not session.should_stop


def _fail_closed_of(callback: Any) -> FailClosed:
    session = callback.session
    return FailClosed() if session is None else session._parts.fail_closed


def is_switched_off(callback: Any, part: str) -> bool:
    """A method of this callback has failed in its session, and is not called any more."""
    return _fail_closed_of(callback).is_off(part)
