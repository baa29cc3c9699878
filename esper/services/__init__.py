"""Long-running processes that are built on the library."""
