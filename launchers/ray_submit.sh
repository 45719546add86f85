#!/usr/bin/env bash
# Submits a run to a Ray cluster and follows it: launchers/ray_submit.sh experiment=quickstart run.dir=/shared/runs/a
#
# RAY_ADDRESS is the dashboard of the cluster, by default http://127.0.0.1:8265 (from elsewhere: an ssh tunnel to it).
# The token of the cluster is read from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[[ ! -d .venv ]] || export PATH=$PWD/.venv/bin:$PATH
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
export RAY_ADDRESS=${RAY_ADDRESS:-http://127.0.0.1:8265}

exec ray job submit --runtime-env launchers/runtime_env.yaml -- python -m sleeptrain.pretrain cluster=ray "$@"
