"""What a copy or a pickle has in the place of a session.

A script may keep its session in its model, in a callback or in a trainer, and copy or save that:
``self.session = esper.attach(self, …)`` and later ``copy.deepcopy(model)`` or ``torch.save``. A
session holds threads and hooks, and it watches the one model that it was made for, not the copy.
"""

from __future__ import annotations

from typing import Any, NoReturn


class CopiedSession:
    """Takes the calls of a training loop and does nothing; it watches no model.

    Attributes:
        run: name of the session's run.
        closed: always True.
        should_stop: always False.
    """

    closed = True
    should_stop = False

    def __init__(self, run: str = "") -> None:
        self.run = run

    def step(self, loss: Any = None) -> None:
        """Nothing is measured."""

    def report(self, **metrics: Any) -> None:
        """Nothing is reported."""

    def detach(self) -> None:
        """There is nothing to take out."""

    def close(self, **options: Any) -> None:
        """There is nothing to end."""

    def __enter__(self) -> CopiedSession:
        return self

    def __exit__(self, *error: object) -> None:
        """The run of the session itself goes on."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"a copy of a session has no {name!r}: it watches no model. Attach the copied model, "
            "or use the session itself",
            name=name,
            obj=self,
        )

    def __repr__(self) -> str:
        return f"<a copy of the session of run {self.run!r}, which watches no model>"
