"""What a training script uses: ``attach`` and the :class:`Session` that it returns.

The session's own modules are here. Beside them:

``transport``   the connection to a server
``export``      a trained model without Esper
``frameworks``  Lightning, the transformers Trainer, Accelerate
"""

from esper.grafting import Receipt
from esper.sdk.adaptation import Adaptation
from esper.sdk.attaching import Mode, attach
from esper.sdk.ending import RunStopped
from esper.sdk.explaining import Reasons
from esper.sdk.local import Waiting
from esper.sdk.session import Session

__all__ = [
    "Adaptation",
    "Mode",
    "Reasons",
    "Receipt",
    "RunStopped",
    "Session",
    "Waiting",
    "attach",
]
