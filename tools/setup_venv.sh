#!/usr/bin/env bash
# setup_venv.sh [--python INTERPRETER] [--venv FOLDER] [--extra NAME]
# Makes the virtual environment (default: .venv beside this project) with the pinned dependencies and
# the project in editable mode, and with those of an extra of pyproject.toml if one is named. Done in well
# under a second when nothing has changed since.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python= extra=
while [ $# -gt 0 ]; do
  case $1 in
    --python) python=$2 ;;
    --venv) venv=$2 ;;
    --extra) extra=$2 ;;
    *) echo "usage: setup_venv.sh [--python INTERPRETER] [--venv FOLDER] [--extra NAME]" >&2; exit 2 ;;
  esac
  shift 2
done

# The root is part of the stamp: an editable install points at it.
stamp=$({ echo "$root"; cat "$root/pyproject.toml" "$root/constraints.txt"; } | cksum)
current() { [ -x "$venv/bin/python" ] && [ "$(cat "$venv/$1" 2>/dev/null)" = "$stamp" ]; }
install() {
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$root/constraints.txt" "$@"
}

if ! current setup.stamp; then
  [ -n "$python" ] || python=$("$root/tools/find_python.sh")
  echo "setting up $venv with $("$python" --version); minutes the first time"
  if [ ! -x "$venv/bin/python" ]; then
    "$python" -m venv "$venv"
  fi
  # torch first: what it needs from the registry depends on the machine, and it fails soonest
  install torch
  install --editable "$root[dev]"
  echo "$stamp" >"$venv/setup.stamp"
fi
if [ -n "$extra" ] && ! current "setup.$extra.stamp"; then
  install --editable "$root[$extra]"
  echo "$stamp" >"$venv/setup.$extra.stamp"
fi
