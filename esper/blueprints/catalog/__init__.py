"""Each file defines one blueprint and is named after its slug."""
