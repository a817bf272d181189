#!/usr/bin/env bash
# Runs every check: shellcheck, ruff, import-linter, mypy, pytest. Installs what they need into .venv.
# Usage: scripts/test.sh [quick] [PYTEST ARGUMENT...]
#   quick  leaves out the tests that are marked slow: what to run after each change
set -euo pipefail
cd "$(dirname "$0")/.."

kinds=()
if [ "${1:-}" = quick ]; then
    kinds=(-m "not slow")
    shift
fi
./scripts/install-tools.sh
./scripts/install.sh dev
export PATH="$PWD/.venv/bin:$PATH"
shellcheck scripts/*.sh scripts/soak scripts/benchmark scripts/mutations .ci/run
ruff check
ruff format --check
lint-imports --no-logo --no-cache
mypy
# Most of the time is waiting, so two share it: each file's tests stay together.
pytest -n 2 --dist loadfile ${kinds[@]+"${kinds[@]}"} "$@"
