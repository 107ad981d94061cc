#!/usr/bin/env bash
# check_transformers.sh [--tokenizer DIR] [--versions "4.52.4 4.57.6 ..."] [--out FILE]
# What we export loads in these versions of transformers, and what they save is imported: prints a
# table and writes it to FILE. Exit status 1 if something fails, or a control does not.
# Each version gets an environment .venv-transformers/VERSION, which takes torch and the rest from
# .venv; the first time costs a minute and 140 MB each. DIR holds Qwen3's tokenizer files.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
pinned=$(sed -n 's/^transformers==//p' "$root/constraints.txt")
versions="4.52.4 4.57.6 $pinned"
write=() report=()
while [ $# -gt 0 ]; do
  case $1 in
    --tokenizer) write=(--tokenizer "$(realpath "$2")") ;;
    --versions) versions=$2 ;;
    --out) report=(--out "$(realpath "$2")") ;;
    *) echo 'usage: check_transformers.sh [--tokenizer DIR] [--versions "..."] [--out FILE]' >&2; exit 2 ;;
  esac
  shift 2
done
cd "$root"
[ -x .venv/bin/python ] || tools/setup_venv.sh
site='import sysconfig; print(sysconfig.get_path("purelib"))'

make_environment() { # VERSION
  local folder=$root/.venv-transformers/$1 stamp
  stamp="$root $1 $(cat .venv/setup.stamp 2>/dev/null || true)"
  [ "$(cat "$folder/setup.stamp" 2>/dev/null)" != "$stamp" ] || return 0
  echo "setting up transformers $1"
  rm -rf "$folder"
  .venv/bin/python -m venv --without-pip "$folder"
  .venv/bin/python -c "$site" >"$("$folder/bin/python" -c "$site")/main.pth"
  "$folder/bin/python" -m pip install -qq --disable-pip-version-check "transformers==$1"
  echo "$stamp" >"$folder/setup.stamp"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1
run_program() { # COMMAND, in every environment
  local version
  for version in $versions; do
    HF_HOME=$work/cache-$version ".venv-transformers/$version/bin/python" \
      tests/versions/program.py "$1" "$work/root" </dev/null
  done
}

for version in $versions; do
  make_environment "$version"
done
.venv/bin/python -m tests.versions write "$work/root" "${write[@]}"
run_program save
.venv/bin/python -m tests.versions import "$work/root"
run_program check
.venv/bin/python -m tests.versions report "$work/root" "${report[@]}"
