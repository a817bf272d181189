#!/usr/bin/env bash
# Starts atomic-balance, opens user 1 with 10,000 if there is no user 1, and follows the logs until Ctrl-C.
# Usage: scripts/start.sh [--docker | --local]
#   --docker  Docker Compose: the service and PostgreSQL in containers
#   --local   a virtual environment in .venv, with an embedded PostgreSQL unless DATABASE_URL is set
#   neither   Docker Compose if an engine answers, else local
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }

die() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

compose() {
    if docker compose version > /dev/null 2>&1; then docker compose "$@"; else docker-compose "$@"; fi
}

have_compose() { docker compose version > /dev/null 2>&1 || docker-compose version > /dev/null 2>&1; }
have_engine() { docker info > /dev/null 2>&1; }

setting() { # setting NAME DEFAULT: from the environment, else from .env
    local value=${!1:-}
    [ -n "$value" ] || value=$(sed -nE "s/^(export )?$1=[\"']?([^\"'#]*[^\"'# ]).*/\2/p" .env | tail -1)
    echo "${value:-$2}"
}

wait_until_ready() { # wait_until_ready SECONDS COMMAND...: gives up after SECONDS, or when COMMAND fails
    local give_up=$((SECONDS + $1))
    until curl --silent --fail --max-time 2 --output /dev/null "$url/readyz"; do
        "${@:2}" 2> /dev/null || die "the service ended before it was ready, see above"
        [ "$SECONDS" -lt "$give_up" ] || die "the service is not ready after $1 s, see $url/readyz"
        sleep 0.1
    done
}

refuse_a_busy_port() { # or what answers there would be taken for the service
    local status=0
    curl --silent --max-time 2 --output /dev/null "$url/healthz" || status=$?
    case $status in
        6 | 7) ;; # no such host, which the service says itself; nobody listens
        *) die "something else answers at $url: stop it, or choose another port with PORT" ;;
    esac
}

greet() {
    local token=
    [ -z "$(setting API_TOKEN '')" ] || token=" -H 'Authorization: Bearer TOKEN'"
    cat <<END

atomic-balance is ready at $url - try it:

  curl -X POST $url/api/balance/update -H 'Content-Type: application/json' -d '{"userId": 1, "amount": -2}'$token

Ctrl-C stops it.

END
}

mode=
for argument; do
    case $argument in
        --docker | --local) mode=${argument#--} ;;
        --help | -h) usage; exit ;;
        *) usage >&2; exit 2 ;;
    esac
done

command -v curl > /dev/null || die "curl is needed (Debian: apt-get install curl)"
[ -e .env ] || cp .env.example .env

if [ -z "$mode" ]; then
    if have_engine && have_compose; then mode=docker; else mode=local; fi
fi
host=$(setting HOST 127.0.0.1)
case $host in 0.0.0.0 | ::) host=127.0.0.1 ;; *:*) host="[$host]" ;; esac
url=http://$host:$(setting PORT 3000)

if [ "$mode" = docker ]; then
    have_engine || die "no Docker engine answers: start one, or use scripts/start.sh --local"
    have_compose || die "Docker Compose is needed (Debian: apt-get install docker-compose), or use scripts/start.sh --local"
    url=http://127.0.0.1:$(setting PORT 3000)
    refuse_a_busy_port
    trap 'compose down' EXIT
    trap 'exit 0' INT TERM
    compose up --build --detach
    wait_until_ready 60 true
    greet
    compose logs --follow --tail 20 &
    wait $! || true
else
    refuse_a_busy_port
    ./scripts/install.sh
    .venv/bin/atomic-balance serve &
    service=$!
    # The service gets the same Ctrl-C from the terminal; the second signal does no harm.
    trap 'kill -TERM $service 2> /dev/null; wait $service' EXIT
    trap 'exit 0' INT TERM
    wait_until_ready 60 kill -0 $service
    .venv/bin/atomic-balance open 1 10000 > /dev/null
    # Two that were started at the same time both found the port free; only one of them could listen.
    kill -0 $service 2> /dev/null || die "the service ended, see above"
    greet
    wait $service
fi
