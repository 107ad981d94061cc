"""How long data-parallel ranks wait for the one with the longest rows. No model, a few seconds.

python tools/benchmarks/balance.py --repeats 200

A rollout of 128 responses of log-normal length (sigma 1, mean 1,000, at most 4,000 tokens; prompts
of 200) is cut into 16 optimizer steps of 8 rows, whose rows are spread over the ranks. Printed is
the longest rank over the mean rank, in tokens of the student's doubled stream: the mean over all
steps, and in brackets the longest ranks of all steps together over the mean ranks, the time lost.

  rollout's order    rows as they come (group_by_length: false)
  grouped by length  what the trainer does

--repeats is the number of rollouts. Nothing is judged.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from measuring import parser, write

from megatron_opdlm.distill.batching import balance, group

ROLLOUT, STEP, RANKS = 128, 8, (8, 4, 2)
ORDERS: dict[str, Callable[[list[int], int], list[list[int]]]] = {
    "rollout's order": lambda lengths, key: group([0] * len(lengths), STEP, key),
    "grouped by length": lambda lengths, key: group(lengths, STEP, key),
}


def draw_lengths(generator: torch.Generator) -> list[int]:
    """Student tokens of the rows of a rollout."""
    noise = torch.randn(ROLLOUT, generator=generator)
    responses = (1000 * (noise - 0.5).exp()).clamp(4, 4000).long()
    return (200 + 2 * responses).tolist()


def loads_of(lengths: list[int], rows: list[int], num_ranks: int) -> list[int]:
    """Tokens of every rank in an optimizer step."""
    parts = balance([lengths[row] for row in rows], num_ranks)
    return [sum(lengths[rows[item]] for item in part) for part in parts]


def main() -> None:
    """Parse the command line and run."""
    args = parser(__doc__ or "", repeats=200).parse_args()
    generator = torch.Generator().manual_seed(0)
    rollouts = [draw_lengths(generator) for _ in range(args.repeats)]
    results = {}
    for num_ranks in RANKS:
        for name, order in ORDERS.items():
            steps = [
                loads_of(lengths, rows, num_ranks)
                for key, lengths in enumerate(rollouts)
                for rows in order(lengths, key)
            ]
            per_step = mean(max(loads) / mean(loads) for loads in steps)
            of_time = sum(map(max, steps)) / sum(map(mean, steps))
            results[f"{name}, {num_ranks} ranks"] = {"per_step": per_step, "of_time": of_time}
            print(f"{num_ranks} ranks, {name:18}{per_step:6.2f} ({of_time:.2f})", flush=True)
    write(args.out, {"results": results})


if __name__ == "__main__":
    main()
