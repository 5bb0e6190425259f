#!/usr/bin/env bash
# Why does accuracy fall as latents grow? bash benchmarks/reliability.sh [--quick] [--jobs N]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./setup.sh
find_python
exec "$PYTHON" benchmarks/reliability.py "$@"
