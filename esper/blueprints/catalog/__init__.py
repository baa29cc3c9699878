"""One file is one blueprint; the file is named like the blueprint's slug."""
