#!/usr/bin/env bash
# stories.sh --model DIR --text FILE [--out DIR] [key=value ...]
# Turns a small Llama that was trained on stories into a block-diffusion model, on this machine's CPU, and measures
# with the Llama itself how likely the student's stories are. See docs/stories.md.
#   --model  Llama in Hugging Face format (stories260K)
#   --text   stories to cut prompts from, paragraphs separated by empty lines (TinyStories)
#   --out    new folder, or that of a run that was stopped, which goes on; default: runs/stories
#   key=value  changes a key of examples/configs/stories.yaml
set -euo pipefail
usage() { sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
out=runs/stories model= text= overrides=()
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --model | --text | --out)
      [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
      declare "${1#--}=$2"; shift 2 ;;
    *=*) overrides+=("$1"); shift ;;
    *) echo "error: unknown argument $1" >&2; usage >&2; exit 2 ;;
  esac
done
[ -f "$model/config.json" ] || { echo "error: --model '$model' must be a Hugging Face directory" >&2; exit 2; }
[ -f "$text" ] || { echo "error: --text '$text' must be a file" >&2; exit 2; }
model=$(realpath "$model") text=$(realpath "$text") out=$(realpath -m "$out")
settings=$(printf '%s\n' "model=$model" "text=$text" ${overrides[@]+"${overrides[@]}"})
if [ -e "$out/report.md" ]; then
  echo "error: --out $out holds a finished run; remove it or choose another folder" >&2; exit 2
elif [ -n "$(ls -A "$out" 2>/dev/null)" ] && [ "$(cat "$out/settings.txt" 2>/dev/null)" != "$settings" ]; then
  echo "error: --out $out is no unfinished run of this model, text and keys; remove it or choose another folder" >&2
  exit 2
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools/setup_venv.sh
export PATH=$PWD/.venv/bin:$PATH
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a second thread costs more than it gives for a model this small
export PYTHONWARNINGS=ignore
run() { printf '\n$ %s\n' "$*"; "$@"; }
decode() { # NAME MODEL TEMPERATURE [options]: responses to the held-out prompts, unless they are there
  local name=$1 source=$2 temperature=$3; shift 3
  [ ! -e "$out/$name.$temperature.jsonl" ] || return 0
  run opdlm generate --model "$source" --prompts "$out/heldout.jsonl" --block-size 4 --max-new-tokens 64 \
    --temperature "$temperature" "$@" --out "$out/$name.$temperature.jsonl" | tail -n 1
}

mkdir -p "$out"
printf '%s\n' "$settings" >"$out/settings.txt"
run python examples/stories/prompts.py --text "$text" --out "$out"
[ -e "$out/student" ] || # outputs of conversions and decodings appear when they are complete
  run opdlm convert import --hf "$model" --out "$out/student" --chat-template examples/stories/plain.jinja
run opdlm convert verify --checkpoint "$out/student" --hf "$model"
for temperature in 0 0.3 1; do decode before "$out/student" "$temperature"; done
run opdlm train examples/configs/stories.yaml "student=$out/student" "data=$out/train.jsonl" \
  "save=$out/run" ${overrides[@]+"${overrides[@]}"}
for temperature in 0 0.3 1; do
  decode static "$out/run" "$temperature"
  decode dynamic "$out/run" "$temperature" --remasking low_confidence_dynamic
done
[ -e "$out/export" ] || run opdlm convert export --checkpoint "$out/run/checkpoints" --out "$out/export" --format a2d
run python examples/stories/score.py --model "$model" --out "$out"
