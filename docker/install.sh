#!/usr/bin/env bash
# Makes a virtual environment with the dependencies that a pyproject.toml names: install.sh PYPROJECT VENV cuda|cpu
# The versions are there and nowhere else. PYTHON is the interpreter to take, by default python3.
set -euo pipefail

pyproject=$1 venv=$2 variant=$3
case $variant in
  cuda) index=() ;;                                                            # PyPI's torch is the one for CUDA
  cpu) index=(--extra-index-url "${CPU_INDEX-https://download.pytorch.org/whl/cpu}") ;;
  *) echo "error: the variant is cuda or cpu, and not '$variant'" >&2; exit 2 ;;
esac
[[ ${index[1]-x} ]] || index=() # CPU_INDEX= : pip's own settings know where torch for CPUs is

"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" - "$pyproject" > "$venv/requirements.txt" << 'READ'
import sys, tomllib
print("\n".join(tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"]))
READ
"$venv/bin/python" -m pip install --no-cache-dir --quiet "${index[@]}" --requirement "$venv/requirements.txt"
"$venv/bin/python" -m pip check
