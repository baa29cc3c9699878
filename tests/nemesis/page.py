"""Results as sections of ``docs/reliability.md``."""

from __future__ import annotations

from hosts.paths import ROOT

PAGE = ROOT / "docs" / "reliability.md"


def read_section(name: str) -> str:
    """What is between the marks."""
    page = PAGE.read_text(encoding="utf-8")
    return page.partition(f"<!-- {name}: generated -->")[2].partition(f"<!-- {name}: end -->")[0]


def write_section(name: str, text: str) -> None:
    """Replace what is between the marks ``<!-- NAME: generated -->`` and ``<!-- NAME: end -->``."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: generated -->", f"<!-- {name}: end -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    PAGE.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")
