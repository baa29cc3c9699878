"""The messages of trainers, one module for each."""

from apps.trainers.answers import acknowledge_command
from apps.trainers.finish import finish_run
from apps.trainers.hello import settle_hello
from apps.trainers.registration import register_run, registration_answer
from apps.trainers.remedies import record_remedy
from apps.trainers.remedy_proposals import take_proposal
from apps.trainers.rollbacks import record_local_rollback
from apps.trainers.telemetry import take_telemetry

__all__ = [
    "acknowledge_command",
    "finish_run",
    "record_local_rollback",
    "record_remedy",
    "register_run",
    "registration_answer",
    "settle_hello",
    "take_proposal",
    "take_telemetry",
]
