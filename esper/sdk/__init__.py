"""What a training script uses: ``attach`` and the :class:`Session` that it returns."""

from esper.grafting import Receipt
from esper.sdk.attaching import attach
from esper.sdk.exporting import export
from esper.sdk.local import Waiting
from esper.sdk.session import RunStopped, Session
from esper.sdk.surgeon import Adaptation

__all__ = ["Adaptation", "Receipt", "RunStopped", "Session", "Waiting", "attach", "export"]
