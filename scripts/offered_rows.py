"""Write ``apps/blueprints/offered.json``: the rows of the catalogues, known without torch.

python -m scripts.offered_rows            write
python -m scripts.offered_rows --check    exit 1 where the file differs
"""

from __future__ import annotations

import json
import sys

from apps.blueprints.offered import WRITTEN, Written, digests_of_sources, offered_by_code
from scripts.generated_page import write_or_check


def render() -> str:
    """The whole file."""
    rows = offered_by_code()
    written: Written = {
        "sources": digests_of_sources(),
        "blueprints": rows.blueprints,
        "remedies": rows.remedies,
    }
    return json.dumps(written, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check(WRITTEN, render, __doc__))
