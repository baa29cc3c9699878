"""A run's connection to the server: sends telemetry and reports, receives commands.

One background thread does the work; the training thread only uses the queues.
"""

from esper.sdk.transport.queues import (
    Pace,
    PendingReport,
    ProposalAnswer,
    ReadyCommand,
    TransportQueues,
)
from esper.sdk.transport.transport import Transport

__all__ = [
    "Pace",
    "PendingReport",
    "ProposalAnswer",
    "ReadyCommand",
    "Transport",
    "TransportQueues",
]
