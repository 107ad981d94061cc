#!/usr/bin/env bash
# parallel_tests.sh PYTEST [ARGUMENTS]: runs tests/unit and tests/distributed at once, because most tests use one
# core. The output of the second comes when it has ended. Exit status 0 = all pass.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
pytest=$1
shift
log=$(mktemp)
trap 'rm -f "$log"' EXIT
set -m # a job of its own: a background job of a script would ignore the interrupts that some tests send
"$pytest" -q tests/distributed "$@" >"$log" 2>&1 &
pid=$!
set +m
trap 'kill -- "-$pid" 2>/dev/null || true; exit 130' INT TERM
status=0
"$pytest" -q tests/unit "$@" || status=$?
wait "$pid" || status=$?
cat "$log"
exit "$status"
