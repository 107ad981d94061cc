#!/usr/bin/env bash
# compare_methods.sh [--seeds 0,1,2] [--methods opdlm,sft] [--jobs N] [--out DIR] [key=value ...]
# Sets everything up in .venv, then trains the quickstart's student by each of the four methods, with several
# seeds, and writes a table like the paper's Tables 4 and 11. See docs/methods.md.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"; exit ;; esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/tools/setup_venv.sh"
exec "$root/.venv/bin/python" "$root/examples/quickstart/compare.py" "$@"
