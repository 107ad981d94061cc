#!/usr/bin/env bash
# run_tests.sh [pytest arguments]: sets everything up, then lint, types and tests. Exit status 0 = all pass.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2s/^# //p' "${BASH_SOURCE[0]}"; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools/setup_venv.sh --extra gguf # for the tests that read a GGUF
tools/setup_venv.sh --extra eval # for graders and lm-eval's tasks
.venv/bin/python tools/get_punkt.py # NLTK's model of sentences, for IFEval
bin=.venv/bin
$bin/ruff check .
$bin/ruff format --check .
$bin/mypy
if [ $# = 0 ]; then
  tools/parallel_tests.sh $bin/pytest
else # one process: a selection may leave nothing of one of the two folders
  $bin/pytest -q tests/unit tests/distributed "$@"
fi
