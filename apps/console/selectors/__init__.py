"""What the pages show, read with a number of queries that does not grow with the rows."""

from apps.console.selectors.bar import adaptation_switch, last_seqs
from apps.console.selectors.inbox import inbox_count

__all__ = ["adaptation_switch", "inbox_count", "last_seqs"]
