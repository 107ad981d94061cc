#!/usr/bin/env bash
# quickstart.sh [--nproc N] [--out DIR] [--seed N] [--num-questions N] [key=value ...]
# Sets everything up in .venv, then distils a small autoregressive teacher into a block-diffusion student on
# this machine, evaluates both, exports the student and writes a report. See docs/quickstart.md.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"; exit ;; esac
started=$(date +%s)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/tools/setup_venv.sh"
exec "$root/.venv/bin/python" "$root/examples/quickstart/run.py" --started "$started" "$@"
