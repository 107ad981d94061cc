#!/usr/bin/env bash
# reproduce.sh NAME [--dry-run | --tiny] [--checkpoints DIR] [--models DIR] [--benchmarks DIR] [--out DIR] | --list
# Sets everything up in .venv, then runs what a table or figure of the paper needs: NAME is table_1 to table_14 or
# figure_1 to figure_6. See docs/reproduce.md.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case " $* " in
  *" --list "* | *" --dry-run "*) tools/setup_venv.sh ;;
  *)
    tools/setup_venv.sh --extra eval
    .venv/bin/python tools/get_punkt.py || true # only IFEval needs it, and says so
    ;;
esac
exec .venv/bin/python examples/reproduce/run.py "$@"
