# Sourced by ./up and ./check:  install_into_venv REQUIREMENTS-FILE [PIP-OPTION…]
# Makes .venv with Python 3.11 or newer, and installs the pinned requirements when they have changed.

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "Esper needs Python 3.11 or newer with venv and pip. On Debian: apt-get install python3 python3-venv." >&2
  return 1
}

hash_of_requirements() { cat requirements/*.txt | "$1" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'; }

install_into_venv() {
  local file="$1" python wanted stamp
  shift
  stamp=".venv/.esper-$(basename "$file" .txt)"
  if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c '' 2>/dev/null; then
    python="$(find_python)" || return 1
    echo "Creating .venv with $python"
    "$python" -m venv --clear .venv || return 1
  fi
  wanted="$(hash_of_requirements .venv/bin/python)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing $file (the first time takes a few minutes)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$file" "$@" || {
      echo "The packages of $file could not be installed; see pip's reason above." >&2
      return 1
    }
    echo "$wanted" > "$stamp"
  fi
  use_source_tree
}

# The venv's Python can "import esper" from any directory, and has the command esper, as if the tree were installed.
use_source_tree() {
  .venv/bin/python -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "esper-source.pth").write_text(str(pathlib.Path.cwd()) + "\n")'
  printf '#!/bin/sh\nexec "%s/.venv/bin/python" -m launcher "$@"\n' "$PWD" > .venv/bin/esper
  chmod +x .venv/bin/esper
}
