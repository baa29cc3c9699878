"""``python -m launcher``: the command ``esper``."""

import sys

if __name__ == "__main__":
    try:
        from launcher.command import main

        main()
    except KeyboardInterrupt:  # Ctrl-C before the command handles signals itself
        sys.exit(130)
