#!/usr/bin/env bash
# A run with several processes on this machine: launchers/local.sh 8 experiment=quickstart
# Without a number: one process per GPU, or one on a machine without.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-.venv/bin/python}
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  num_procs=$1
  shift
else
  num_procs=$("$PYTHON" -c "import torch; print(max(1, torch.cuda.device_count()))")
fi
exec "$PYTHON" -m sleeptrain.pretrain cluster=local_procs cluster.num_workers="$num_procs" "$@"
