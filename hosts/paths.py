"""Where Esper's own files are, and where its data is kept by default.

A clone and the installed server have the same layout below ``ROOT``: ``apps``, ``templates``,
``locale``, ``static``, ``recipes``, ``examples``. Only a clone has the script ``up``, and keeps its
data in ``var``; an installed server keeps it in the user data directory of the platform.
"""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_data_path

ROOT = Path(__file__).resolve().parents[1]


def is_clone(root: Path = ROOT) -> bool:
    """Whether Esper runs from its source tree."""
    return (root / "up").is_file()


def default_data_dir(root: Path = ROOT) -> Path:
    """``ESPER_DATA_DIR``, else ``var`` in a clone, else the user data directory."""
    if given := os.environ.get("ESPER_DATA_DIR"):
        return Path(given).expanduser().resolve()
    return root / "var" if is_clone(root) else user_data_path("esper", appauthor=False)
