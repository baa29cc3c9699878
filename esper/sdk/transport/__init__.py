"""A run's connection to the server: telemetry and reports go out, commands come in.

One background thread does all of it; the training thread only puts into and takes from the queues.
"""

from esper.sdk.transport.queues import Pace, PendingReport, ReadyCommand, TransportQueues
from esper.sdk.transport.transport import Transport

__all__ = ["Pace", "PendingReport", "ReadyCommand", "Transport", "TransportQueues"]
