#!/usr/bin/env bash
# Runs the tests that need a GPU, on a machine that has torch and little else: no Django, no server.
# ./check cuda, or scripts/check_cuda.sh. ESPER_TEST_DEVICE=cpu runs those that can on the CPU.
# PYTHON names the interpreter that has torch; without one, .venv-cuda is made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
needed=(torch numpy msgspec httpx websockets cryptography safetensors cloudpickle pytest)

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null; }
missing() { local name; for name in "${needed[@]}"; do has "$name" || echo "$name"; done; }

if [ -n "$(missing)" ]; then
  # With the machine's own packages, so that its torch is used where it has one.
  [ -x .venv-cuda/bin/python ] || "$python" -m venv --system-site-packages .venv-cuda
  python=.venv-cuda/bin/python
  for name in $(missing); do
    "$python" -m pip install --quiet --disable-pip-version-check "$(grep -hE "^$name==" requirements/dev.txt requirements/app.txt | head -n 1 || echo "$name")"
  done
fi
device="${ESPER_TEST_DEVICE:-cuda}"
"$python" - "$device" <<'PYTHON'
import sys
import torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} finds no CUDA device; ESPER_TEST_DEVICE=cpu runs the tests on the CPU")
name = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "the CPU"
print(f"torch {torch.__version__} on {name}")
PYTHON
# Without the project's conftest.py, settings and plugins: they need the server's packages.
exec env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 ESPER_TEST_DEVICE="$device" PYTHONPATH="$PWD" timeout 480 "$python" -m pytest -q -c scripts/cuda.ini \
  --rootdir . --noconftest -m cuda tests/esper/cuda
