"""Settings: ``base`` is shared, ``local`` is for ``./up``, ``test`` for pytest, ``production``."""
