"""One file for each page: its view, and the rows that it shows."""
