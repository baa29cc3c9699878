"""The installed Esper server.

This folder has the layout of a clone: ``apps``, ``esper_web``, ``launcher``, ``hosts``,
``templates``, ``locale``, ``static``, ``recipes``, ``examples``. It is put on the path of Esper's
own processes only, so an environment with the server has no top-level package ``apps``.
"""
