#!/usr/bin/env bash
# Make what args/quickstart.yaml needs, where it is missing: bash preprocessing/quickstart.sh [PYTHON]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:-python3}
if [[ ! -f data/quickstart_train.json || ! -f data/quickstart_validation.json ]]; then
    "$python" preprocessing/arithmetic_stories.py --output_dir data --prefix quickstart
fi
if [[ ! -f data/quickstart_model/config.json ]]; then
    "$python" preprocessing/small_model.py --output_dir data/quickstart_model
fi
