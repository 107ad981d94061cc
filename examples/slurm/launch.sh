#!/usr/bin/env bash
# launch.sh FILE [arguments]: starts a Python file on every GPU of this job or machine.
#   in a Slurm allocation   one torchrun per node, which meet at the first node
#   elsewhere               torchrun on the GPUs of this machine; one plain process if it has none
#   with --dry-run          one plain process
set -euo pipefail
script=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# An active environment wins; then the one that tools/setup_venv.sh makes; then the system's.
if [ -n "${VIRTUAL_ENV:-}" ]; then
  python=$VIRTUAL_ENV/bin/python
elif [ -x "$root/.venv/bin/python" ]; then
  python=$root/.venv/bin/python
else
  python=python3
  if ! python3 -c 'import omegaconf, torch' 2>/dev/null; then
    echo "error: this python3 has not the packages that $script needs; run: bash tools/setup_venv.sh" >&2
    exit 2
  fi
fi

gpus=0
if command -v nvidia-smi >/dev/null; then
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
fi

for argument in "$@"; do
  if [ "$argument" = --dry-run ]; then
    # the node that the SBATCH lines of the file ask for; a --gpus of the user comes later and wins
    exec "$python" "$script" --gpus 8 "$@"
  fi
done

if [ -n "${SLURM_JOB_ID:-}" ]; then
  nodes=${SLURM_JOB_NUM_NODES:-1}
  # no pipe into head: it leaves early, and then pipefail ends this script
  read -r head_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one node do not meet
  exec srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    "$python" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node=gpu \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head_node:$port" \
    "$script" "$@"
fi

if [ "$gpus" -gt 0 ]; then
  exec "$python" -m torch.distributed.run --standalone --nproc-per-node="$gpus" "$script" "$@"
fi
exec "$python" "$script" "$@"
