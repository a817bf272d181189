#!/usr/bin/env bash
# Installs the programs besides Python that tests and the benchmark need. It can do so as root on Debian; elsewhere it
# does nothing, and tests that need a missing program are skipped and say so.
set -euo pipefail

missing=()
need() { command -v "$1" > /dev/null || missing+=("$2"); } # need PROGRAM PACKAGE
need chromium chromium
need faketime faketime
need node nodejs
need pgbouncer pgbouncer
need promtool prometheus
need psql postgresql-client
need wrk wrk

if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "Installing ${missing[*]} ..."
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update > /dev/null
    apt-get -qq install -y --no-install-recommends "${missing[@]}" > /dev/null
fi
