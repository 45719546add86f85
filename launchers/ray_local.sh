#!/usr/bin/env bash
# A Ray cluster of this machine alone, for launchers/ray_submit.sh: every port on loopback, and a token.
# Stop it with: ray stop
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[[ ! -d .venv ]] || PATH=$PWD/.venv/bin:$PATH # jobs take the python that the head finds on its PATH
export PATH RAY_AUTH_MODE=token
set -a; source launchers/ray.env; set +a
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0    # Ray's switch for "no cluster": it listens on 127.0.0.1 alone

ray get-auth-token --generate > /dev/null     # in ~/.ray/auth_token, unless there is one
exec ray start --head "$@"
