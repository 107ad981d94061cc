#!/usr/bin/env bash
# find_python.sh [VERSION ...]: prints the first interpreter of the given versions that works.
# Without arguments: a Python this project runs on. 3.11 comes first because its dependency set was
# the smallest wherever we looked; see docs/launching.md.
# Looks on PATH and in pyenv's folder of versions; a pyenv shim of an inactive version does not count.
set -euo pipefail
[ $# -gt 0 ] || set -- 3.11 3.12 3.13

works() { # COMMAND VERSION
  "$1" -c "import ensurepip, sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$2')" 2>/dev/null
}

for version in "$@"; do
  for candidate in "python$version" python3 python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version"*/bin/python; do
    if works "$candidate" "$version"; then
      "$candidate" -c 'import sys; print(sys.executable)'
      exit 0
    fi
  done
done
echo "no Python $* found; install one, with its venv module" >&2
exit 1
