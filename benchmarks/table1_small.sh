#!/usr/bin/env bash
# The paper's Table 1 in miniature: bash benchmarks/table1_small.sh [--quick] [--jobs N]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./setup.sh
find_python
exec "$PYTHON" benchmarks/table1_small.py "$@"
