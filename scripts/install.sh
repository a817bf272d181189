#!/usr/bin/env bash
# Makes or brings up to date the virtual environment .venv, with the tested versions of requirements.txt.
# Usage: scripts/install.sh [EXTRA]
#   EXTRA  embedded, for a PostgreSQL of its own (the default), or dev, for what the tests need as well
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${1:-embedded}
stamp=.venv/installed-$extra

die() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

if [ ! -x .venv/bin/python ]; then
    for python in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
        [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && break
        python=
    done
    [ -n "$python" ] || die "Python 3.11 or newer is needed (Debian: apt-get install python3 python3-venv)"
    if ! "$python" -m venv .venv > /dev/null; then
        rm -rf .venv
        die "$python can't make a virtual environment (Debian: apt-get install python3-venv)"
    fi
fi

# The stamp records what the installation was made from, so that a second run has nothing to do.
wanted=$(cat requirements.txt setup.cfg pyproject.toml | cksum; pwd)
if [ "$(cat "$stamp" 2> /dev/null)" != "$wanted" ]; then
    echo "Installing into .venv ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint requirements.txt \
        --editable ".[$extra]" || die "pip could not install what requirements.txt and setup.cfg name"
    printf '%s' "$wanted" > "$stamp"
fi
