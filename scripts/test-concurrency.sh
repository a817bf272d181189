#!/usr/bin/env bash
# The reference race: opens a fresh account with 10,000, sends 10,000 concurrent requests that each withdraw 2, and
# exits 0 only if exactly 5,000 succeeded, exactly 5,000 were refused with "Insufficient funds" and the balance is 0.
# Needs bash, curl and jq, and a running service. Can be repeated: each run opens an account of its own.
# Usage: scripts/test-concurrency.sh [--help]
# Settings, in the environment: BASE_URL (http://127.0.0.1:PORT), PORT (3000), REQUESTS (10000), AMOUNT (2), BALANCE (10000),
# PARALLEL (200): how many requests are under way at any time, API_TOKEN, if the service wants one.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }

case ${1:-} in
    '') ;;
    --help | -h) usage; exit ;;
    *) usage >&2; exit 2 ;;
esac

base_url=${BASE_URL:-http://127.0.0.1:${PORT:-3000}}
requests=${REQUESTS:-10000} amount=${AMOUNT:-2} balance=${BALANCE:-10000} parallel=${PARALLEL:-200}

die() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

for tool in curl jq; do
    command -v "$tool" > /dev/null || die "$tool is needed (Debian: apt-get install $tool)"
done
for number in "$requests" "$amount" "$balance" "$parallel"; do
    [[ $number =~ ^[1-9][0-9]{0,14}$ ]] || die "REQUESTS, AMOUNT, BALANCE and PARALLEL: expected a positive number, not '$number'"
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
headers=(-H 'Content-Type: application/json' -H "Authorization: Bearer ${API_TOKEN:-none}")

user=
for _ in 1 2 3; do
    candidate=$(((RANDOM << 30 | RANDOM << 15 | RANDOM) + 1000000))
    status=$(curl --silent --output "$work/opened" --write-out '%{http_code}' -X PUT "${headers[@]}" \
        -d "{\"balance\":$balance}" "$base_url/api/users/$candidate") || die "nothing answers at $base_url: run scripts/start.sh"
    if [ "$status" = 201 ]; then user=$candidate && break; fi
done
[ -n "$user" ] || die "no account could be opened: $status $(cat "$work/opened")"

could_succeed=$((balance / amount))
want_applied=$((could_succeed < requests ? could_succeed : requests))
want_refused=$((requests - want_applied))
want_balance=$((balance - want_applied * amount))
echo "User $user has $balance; $requests requests withdraw $amount each, $parallel at a time."

# The number in the fragment gives each answer a file of its own; it is not sent.
mkdir "$work/body"
started=$(date +%s%N)
curl --silent --parallel --parallel-immediate --parallel-max "$parallel" -X POST "${headers[@]}" \
    -d "{\"userId\":$user,\"amount\":-$amount}" --output "$work/body/#1" --write-out '%{http_code} %{filename_effective}\n' \
    "$base_url/api/balance/update#[1-$requests]" > "$work/answers" 2> /dev/null &
curl_pid=$!
while kill -0 "$curl_pid" 2> /dev/null; do
    if [ -t 2 ]; then printf '\r%d of %d answered' "$(wc -l < "$work/answers")" "$requests" >&2; fi
    sleep 0.2
done
wait "$curl_pid" || true
elapsed_ms=$((($(date +%s%N) - started) / 1000000))
[ ! -t 2 ] || printf '\r\033[K' >&2

# Each answer as one line: status, tab, body.
awk '{ body = ""; getline body < $2; close($2); print $1 "\t" body }' "$work/answers" > "$work/lines"
count() { grep -cxE "$1" "$work/lines" || true; }
applied=$(count "200	\{\"userId\":$user,\"newBalance\":[0-9]+\}")
refused=$(count "400	\{\"error\":\"Insufficient funds\"\}")
distinct=$(awk -F '\t' '$1 == 200 { print $2 }' "$work/lines" | jq -c .newBalance 2> /dev/null | sort -u | wc -l)
final=$(curl --silent "${headers[@]}" "$base_url/api/users/$user" | jq -r .balance) || final=unknown

verdict=0
row() { # row TEXT EXPECTED FOUND
    local mark=ok
    [ "$2" = "$3" ] || { mark=WRONG && verdict=1; }
    printf '%-34s %10s %10s  %s\n' "$1" "$2" "$3" "$mark"
}
printf '\n%-34s %10s %10s\n' '' expected found
row '200, with the new balance' "$want_applied" "$applied"
row '400 "Insufficient funds"' "$want_refused" "$refused"
row 'anything else, or no answer' 0 $((requests - applied - refused))
row 'different new balances' "$want_applied" "$distinct"
row 'balance at the end' "$want_balance" "$final"
printf '\n%d requests in %d.%01d s\n' "$requests" $((elapsed_ms / 1000)) $((elapsed_ms % 1000 / 100))
if [ "$verdict" != 0 ]; then
    echo "Not exactly right. Other answers:" >&2
    grep -vxE "200	.*|400	\{\"error\":\"Insufficient funds\"\}" "$work/lines" | sort | uniq -c | sort -rn | head -5 >&2 || true
fi
exit "$verdict"
