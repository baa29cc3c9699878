"""Does it pay? Esper against what its cost would buy otherwise; see ``docs/benefit.md``."""
