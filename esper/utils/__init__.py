"""Home of ``config``, which the seed's import names."""
