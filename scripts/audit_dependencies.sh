#!/usr/bin/env bash
# Looks the pinned packages up in PyPI's database of known weaknesses; it needs the internet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
pip install --quiet --disable-pip-version-check -r requirements/audit.txt
# The files are complete, so nothing is resolved: that would need torch's packages.
pip-audit --no-deps --disable-pip --strict --progress-spinner off -r requirements/app.txt
