"""Changes of accounts, which the audit log records.

A receiver runs in the transaction of the change, and its error undoes the change.
"""

from django.dispatch import Signal

# Arguments: actor, act, object_kind, object_uid; where they apply: run_uid, data.
account_changed = Signal()
