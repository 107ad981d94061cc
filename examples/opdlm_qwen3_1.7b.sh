#!/usr/bin/env bash
#SBATCH --job-name=opdlm_qwen3_1.7b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
""":"
# Valid bash and valid Python: `bash FILE`, `sbatch FILE` and `torchrun FILE` all start the training of
# examples/configs/qwen3_1.7b.yaml. Arguments are passed on: key=value, --dry-run. See docs/launching.md.
script=${BASH_SOURCE[0]}
if [ ! -f "$(dirname "$script")/slurm/launch.sh" ]; then  # sbatch runs a copy in a spool folder
  script=$(scontrol show job "$SLURM_JOB_ID" | awk -F '[= ]+' '/^ *Command=/ {print $3; exit}')
fi
exec bash "$(dirname "$script")/slurm/launch.sh" "$script" "$@"
: <<'# end of the Python part'
":"""
import sys
from pathlib import Path

from megatron_opdlm.cli import main

if __name__ == "__main__":
    name = Path(__file__).stem.removeprefix("opdlm_")
    config = Path(__file__).resolve().parent / "configs" / f"{name}.yaml"
    sys.exit(main(["train", str(config), *sys.argv[1:]]))
# end of the Python part
