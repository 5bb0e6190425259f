#!/usr/bin/env bash
# Set up what is missing, then lint and run every test: bash run_tests.sh [pytest options]
# -m "not slow": the quick ones; -m cuda: those that need a GPU. COCONUT_TEST_DATA and
# COCONUT_TEST_TOKENIZER: folders with real data and the real Qwen3 tokenizer; the tests that need
# them are skipped without.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup.sh
find_python
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
# one worker for each core; whole files, so that what a file prepares once is prepared once
exec "$PYTHON" -m pytest --numprocesses auto --dist loadfile "$@"
