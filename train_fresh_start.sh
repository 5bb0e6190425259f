#!/usr/bin/env bash
# Start a training: bash train_fresh_start.sh [YAML ...] [KEY=VALUE ...]
# NPROC_PER_NODE: processes, one for each GPU; default: all visible GPUs, 1 without any.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
CALLED_FROM=$PWD
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup.sh
launch fresh args/gsm8k_coconut_qwen3_a100_fresh_start.yaml "$@"
