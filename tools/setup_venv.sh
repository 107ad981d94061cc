#!/usr/bin/env bash
# setup_venv.sh [--python INTERPRETER] [--venv FOLDER]
# Makes the virtual environment (default: .venv beside this project) with the pinned dependencies and
# the project in editable mode. Done in well under a second when nothing has changed since.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=
while [ $# -gt 0 ]; do
  case $1 in
    --python) python=$2 ;;
    --venv) venv=$2 ;;
    *) echo "usage: setup_venv.sh [--python INTERPRETER] [--venv FOLDER]" >&2; exit 2 ;;
  esac
  shift 2
done

# The root is part of the stamp: an editable install points at it.
stamp=$({ echo "$root"; cat "$root/pyproject.toml" "$root/constraints.txt"; } | cksum)
if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/setup.stamp" 2>/dev/null)" = "$stamp" ]; then
  exit 0
fi

[ -n "$python" ] || python=$("$root/tools/find_python.sh")
echo "setting up $venv with $("$python" --version); minutes the first time"
if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv "$venv"
fi
install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check
  --constraint "$root/constraints.txt")
# torch first: what it needs from the registry depends on the machine, and it fails soonest
"${install[@]}" torch
"${install[@]}" --editable "$root[dev]"
echo "$stamp" >"$venv/setup.stamp"
