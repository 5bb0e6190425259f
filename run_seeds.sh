#!/usr/bin/env bash
# Train every combination of seeds and values, and write one table:
#   bash run_seeds.sh YAML [YAML ...] seed=0,1,2 [KEY=A,B ...] [KEY=VALUE ...] [--jobs N] [--sweep]
# --help says more. The same command goes on where it was stopped.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
CALLED_FROM=$PWD
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup.sh
find_python
for argument in "$@"; do
    shift
    set -- "$@" "$(where_it_is "$argument")"
done
exec "$PYTHON" -m analysis seeds "$@"
