#!/usr/bin/env bash
# Make what args/quickstart.yaml needs, where it is missing: bash preprocessing/quickstart.sh [PYTHON]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./setup.sh
PYTHON=${1:-}
[[ -n $PYTHON ]] || find_python
if [[ ! -f data/quickstart_train.json || ! -f data/quickstart_validation.json ]]; then
    "$PYTHON" preprocessing/arithmetic_stories.py --output_dir data --prefix quickstart
fi
if [[ ! -f data/quickstart_model/config.json ]]; then
    "$PYTHON" preprocessing/small_model.py --output_dir data/quickstart_model
fi
