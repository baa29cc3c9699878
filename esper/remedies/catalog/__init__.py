"""One remedy in each file; the file's name is its slug."""
