"""The command ``esper`` of the installed server; ``python -m esper_control_server`` is the same."""

import os
import sys
from pathlib import Path

FOLDER = str(Path(__file__).resolve().parent)


def main() -> None:
    """Runs the command line of ``launcher`` from this folder."""
    sys.path.insert(0, FOLDER)
    # Child processes get it too.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [FOLDER, os.environ.get("PYTHONPATH")]))
    try:
        from launcher.command import main as run

        run()
    except KeyboardInterrupt:  # Ctrl-C before the command handles signals itself
        sys.exit(130)


if __name__ == "__main__":
    main()
