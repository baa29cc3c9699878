"""All that other apps may do with the audit log."""

from apps.audit.chain import ChainReport, event_content, record, take_turn, verify_chain
from apps.audit.heads import set_heads_aside, sign_head, trusted_keys
from apps.audit.roles import RoleError, grant_to_role
from apps.audit.sign_ins import (
    Attempt,
    note_brake,
    note_refused_identity,
    note_refused_sign_in,
    note_sign_in,
    note_sign_out,
    seconds_to_wait,
)

__all__ = [
    "Attempt",
    "ChainReport",
    "RoleError",
    "event_content",
    "grant_to_role",
    "note_brake",
    "note_refused_identity",
    "note_refused_sign_in",
    "note_sign_in",
    "note_sign_out",
    "record",
    "seconds_to_wait",
    "set_heads_aside",
    "sign_head",
    "take_turn",
    "trusted_keys",
    "verify_chain",
]
