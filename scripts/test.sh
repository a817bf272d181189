#!/usr/bin/env bash
# Runs every check: shellcheck, ruff, mypy, pytest (its arguments are passed on). Installs what they need into .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

./scripts/install-tools.sh
./scripts/install.sh dev
export PATH="$PWD/.venv/bin:$PATH"
shellcheck scripts/*.sh scripts/soak scripts/benchmark .ci/run
ruff check
ruff format --check
mypy
pytest "$@"
