"""Draw ``docs/images/<name>.mmd`` as ``<name>.svg``, so that the pages need no drawing library.

python -m scripts.diagram_docs            draw with mermaid (npm) and Chromium, write
python -m scripts.diagram_docs --check    offline: exit 1 where a drawing is not of its text
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
MERMAID = "mermaid@11.17.2"
SCRIPT = "package/dist/mermaid.min.js"
# Text as SVG text, not as HTML inside of it: an <img> shows that everywhere. A white ground, so
# that the lines can be seen on a dark page too.
SETTINGS = """{startOnLoad: false, theme: 'default', htmlLabels: false,
  flowchart: {htmlLabels: false, useMaxWidth: false}, sequence: {useMaxWidth: false},
  fontFamily: 'sans-serif', themeCSS: 'svg {background: white}'}"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="draw nothing, compare")
    if parser.parse_args().check:
        old = stale(FOLDER)
        for name in old:
            print(f"{name} is not drawn from its text", file=sys.stderr)
        return 1 if old else 0
    sources = sorted(FOLDER.glob("*.mmd"))
    for source, drawing in zip(sources, draw([s.read_text() for s in sources]), strict=True):
        text = f"{drawing}\n{_mark(source)}\n"
        source.with_suffix(".svg").write_text(text, encoding="utf-8")
    return 0


def stale(folder: Path) -> list[str]:
    """Names of drawings that are missing, or were drawn from another text."""
    return [
        source.stem
        for source in sorted(folder.glob("*.mmd"))
        if not (svg := source.with_suffix(".svg")).exists() or _mark(source) not in svg.read_text()
    ]


def draw(texts: list[str]) -> list[str]:
    """The SVG of each text."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_content("<body></body>")
        page.add_script_tag(content=_mermaid())
        page.evaluate(f"mermaid.initialize({SETTINGS})")
        drawn = [
            str(page.evaluate(_RENDER, [f"diagram{number}", text]))
            for number, text in enumerate(texts)
        ]
        browser.close()
    return drawn


# Serialised as XML: an image is no HTML, where <br> needs no end.
_RENDER = """async ([name, text]) => {
  const {svg} = await mermaid.render(name, text);
  const holder = document.createElement('div');
  holder.innerHTML = svg;
  return new XMLSerializer().serializeToString(holder.firstElementChild);
}"""


def _mermaid() -> str:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["npm", "pack", MERMAID, "--pack-destination", folder, "--silent"],  # noqa: S607
            check=True,
            timeout=120,
            stdout=subprocess.DEVNULL,
        )
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            script = archive.extractfile(SCRIPT)
            if script is None:
                raise FileNotFoundError(f"{MERMAID} has no {SCRIPT}")
            return script.read().decode("utf-8")


def _mark(source: Path) -> str:
    return f"<!-- sha256 of its text: {hashlib.sha256(source.read_bytes()).hexdigest()} -->"


if __name__ == "__main__":
    sys.exit(main())
