#!/usr/bin/env bash
# Set up what is missing and run every test: bash run_tests.sh [pytest options]
# COCONUT_TEST_DATA and COCONUT_TEST_TOKENIZER: folders with real data and the real Qwen3 tokenizer;
# the tests that need them are skipped without.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source setup.sh
find_python
exec "$PYTHON" -m pytest "$@"
