#!/usr/bin/env bash
# Trains on Cloud TPU from a workstation: launch/tpu.sh --help. Finds a Python for
# llamapro_jax/launch/tpu.py, which needs no package beside the standard library.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$candidate" -m llamapro_jax.launch.tpu "$@"
  fi
done
echo "error: no Python 3.11 or newer is on PATH; install one, or set PYTHON=/path/to/python3.11" >&2
exit 2
