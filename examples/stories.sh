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
fail() { echo "error: $*" >&2; exit 2; }
out=runs/stories model= text= overrides=() untrained=()
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --model | --text | --out)
      [ $# -ge 2 ] || fail "$1 needs a value"
      declare "${1#--}=$2"; shift ;;
    -*) fail "unknown argument $1; --help shows all" ;;
    student=* | teacher=* | data=* | save=* | import_cache=* | mask_token=* | mask_init=* | make_vocab_size_divisible_by=*)
      fail "$1 is set by the script; leave it out" ;;
    *=*)
      overrides+=("$1")
      case $1 in
        block_size=*) untrained+=(--block-size "${1#*=}") ;;
        prediction=*) untrained+=(--prediction "${1#*=}") ;;
      esac ;;
    *) fail "unknown argument $1; --help shows all" ;;
  esac
  shift
done
[ -f "$model/config.json" ] || fail "--model '$model' must be a Hugging Face directory"
[ -f "$text" ] || fail "--text '$text' must be a file"
[ -n "$out" ] || fail "--out is empty; name a folder"
model=$(realpath -- "$model") || exit 2
text=$(realpath -- "$text") || exit 2
out=$(realpath -m -- "$out") || exit 2
said=$(LC_ALL=C stat -- "$out" 2>&1 >/dev/null) || true
case $said in
  '' | *'No such file or directory' | *'Not a directory') ;;
  *) fail "--out: ${said##*: }; choose another path" ;;
esac
there=$out
until [ -e "$there" ]; do there=$(dirname -- "$there"); done
[ -d "$there" ] || fail "--out $out: $there is not a folder; choose another path"
settings=$(printf '%s\n' "model=$model" "text=$text" ${overrides[@]+"${overrides[@]}"})
if [ -e "$out/report.md" ]; then
  fail "--out $out holds a finished run; remove it or choose another folder"
elif [ -n "$(ls -A "$out" 2>/dev/null)" ] && [ "$(cat "$out/settings.txt" 2>/dev/null)" != "$settings" ]; then
  fail "--out $out is no unfinished run of this model, text and keys; remove it or choose another folder"
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools/setup_venv.sh
export PATH=$PWD/.venv/bin:$PATH
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a second thread costs more than it gives for a model this small
export PYTHONWARNINGS=ignore
show() { printf '\n$'; printf ' %q' "$@"; echo; }
run() { show "$@"; "$@"; }
decode() { # NAME MODEL TEMPERATURE [options]: responses to the held-out prompts, unless they are there
  local name=$1 source=$2 temperature=$3 command; shift 3
  [ ! -e "$out/$name.$temperature.jsonl" ] || return 0
  command=(opdlm generate --model "$source" --prompts "$out/heldout.jsonl" --max-new-tokens 64
    --temperature "$temperature" "$@" --out "$out/$name.$temperature.jsonl")
  show "${command[@]}"
  "${command[@]}" | tail -n 1
}

# Wrong keys, and a model that cannot be trained, are found before any work.
opdlm train examples/configs/stories.yaml --dry-run "student=$model" ${overrides[@]+"${overrides[@]}"} >/dev/null
mkdir -p "$out"
printf '%s\n' "$settings" >"$out/settings.txt"
run python examples/stories/prompts.py --text "$text" --out "$out"
[ -e "$out/student" ] || # outputs of conversions and decodings appear when they are complete
  run opdlm convert import --hf "$model" --out "$out/student" --chat-template examples/stories/plain.jinja
run opdlm convert verify --checkpoint "$out/student" --hf "$model"
for temperature in 0 0.3 1; do
  decode before "$out/student" "$temperature" ${untrained[@]+"${untrained[@]}"}
done
run opdlm train examples/configs/stories.yaml "student=$out/student" "data=$out/train.jsonl" \
  "save=$out/run" ${overrides[@]+"${overrides[@]}"}
for temperature in 0 0.3 1; do
  decode static "$out/run" "$temperature"
  decode dynamic "$out/run" "$temperature" --remasking low_confidence_dynamic
done
[ -e "$out/export" ] || run opdlm convert export --checkpoint "$out/run/checkpoints" --out "$out/export" --format a2d
run python examples/stories/score.py --model "$model" --out "$out"
