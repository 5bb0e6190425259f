#!/usr/bin/env bash
# Go on with a training from its newest checkpoint: bash train_continue_fresh.sh [YAML ...] [KEY=VALUE ...]
# NPROC_PER_NODE: processes, one for each GPU; default: all visible GPUs, 1 without any.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
CALLED_FROM=$PWD
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup.sh
launch continue args/gsm8k_coconut_qwen3_a100_fresh_continue.yaml "$@"
