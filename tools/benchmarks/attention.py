"""What attention over the doubled stream costs, forward and backward, one layer.

python tools/benchmarks/attention.py                 # about 2 minutes on one core
python tools/benchmarks/attention.py --repeats 5 --out attention.json

One row: a prompt of 200 tokens, a response of 512 to 4,096, clean and noisy, blocks of 4; 8 query
heads, 4 key heads of 32 channels, float32, one thread.

  tiles  model.tiles, what a CPU runs: runs of 64 queries, no mask over the keys that all
         of them see, keys gathered again for the backward pass
  dense  scaled_dot_product_attention with a mask over all pairs of the stream, keys repeated for
         their query heads, as transformers does it

FlexAttention, which a GPU runs, has no backward pass on a CPU.

Masks and tiles are made once per stream and not timed: all layers share them. Before anything is
timed, outputs and gradients of all arms must agree to 1e-5 of the largest value. Peak memory is
that of the longest response, masks and tiles included, above the queries, keys and values; every
number from a process of its own (VmHWM). `growth` is the exponent of the length between the two
longest streams. Nothing is judged.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from measuring import in_fresh_process, in_turn, medians, parser, peak_above, write
from torch import Tensor

from megatron_opdlm.diffusion.tags import make_tags, visible
from megatron_opdlm.model.tiles import make_tiles, tiled_attention

PROMPT, BLOCK = 200, 4
RESPONSES = (512, 1024, 2048, 4096)
HEADS, KEY_HEADS, WIDTH = 8, 4, 32
SCALE = WIDTH**-0.5

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def tags_of(num_response: int) -> Tensor:
    """[N, 5]: the stream; nobody sees the last clean block, so it is not there."""
    end = PROMPT + num_response
    clean = make_tags(0, torch.arange(end - BLOCK), noisy=0, block_size=BLOCK)
    noisy = make_tags(0, torch.arange(PROMPT, end), noisy=1, block_size=BLOCK)
    return torch.cat([clean, noisy])


def tiles(tags: Tensor) -> Attend:
    made = make_tiles(tags)
    return lambda query, key, value: tiled_attention(query, key, value, made, SCALE)


def dense(tags: Tensor) -> Attend:
    mask = visible(tags, tags)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (key, value))
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALE)
        return output[0].transpose(0, 1)

    return attend


ARMS: dict[str, Callable[[Tensor], Attend]] = {"tiles": tiles, "dense": dense}


def make_inputs(length: int) -> list[Tensor]:
    """Query, key, value, and a direction that the output is multiplied by."""
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    drawn = [torch.randn(length, n, WIDTH, generator=generator) for n in heads]
    return [x.requires_grad_() for x in drawn[:3]] + drawn[3:]


def forward_backward(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    """Output and the three gradients."""
    output = attend(*inputs[:3])
    return [output.detach(), *torch.autograd.grad(output, inputs[:3], inputs[3])]


def check(length: int, found: dict[str, list[Tensor]]) -> None:
    """Exits unless all arms agree."""
    expected = found["dense"]
    for arm, tensors in found.items():
        names = ("output", "query gradient", "key gradient", "value gradient")
        for name, got, want in zip(names, tensors, expected, strict=True):
            apart = float((got - want).abs().max() / want.abs().max())
            if not apart < 1e-5:
                sys.exit(f"{length} tokens: the {name} of {arm} is {apart:.1e} away from dense")


def run_arm(arm: str, num_response: int) -> None:
    """In a process of its own: prints the peak memory as JSON."""
    torch.set_num_threads(1)
    small = tags_of(16)
    forward_backward(ARMS[arm](small), make_inputs(len(small)))  # what libraries allocate once
    tags = tags_of(num_response)
    inputs = make_inputs(len(tags))
    _, peak = peak_above(lambda: forward_backward(ARMS[arm](tags), inputs))
    print(json.dumps({"peak_bytes": peak}))


def main() -> None:
    """Parse the command line and run."""
    options = parser(__doc__ or "", repeats=3)
    options.add_argument("--run-arm", nargs=2, help="used by the benchmark itself")
    args = options.parse_args()
    if args.run_arm is not None:
        return run_arm(args.run_arm[0], int(args.run_arm[1]))
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    lengths = []
    for num_response in RESPONSES:
        tags = tags_of(num_response)
        lengths.append(len(tags))
        inputs = make_inputs(len(tags))
        arms = {arm: make(tags) for arm, make in ARMS.items()}
        check(len(tags), {arm: forward_backward(run, inputs) for arm, run in arms.items()})

        def measured(run: Attend, inputs: list[Tensor] = inputs) -> Callable[[], object]:
            return lambda: forward_backward(run, inputs)

        taken = in_turn({arm: measured(run) for arm, run in arms.items()}, args.repeats)
        seconds, density = medians(taken), float(visible(tags, tags).float().mean())
        times = ", ".join(f"{arm} {s:.3f} ({s / seconds['tiles']:.2f} x)"
                          for arm, s in seconds.items())  # fmt: skip
        print(f"{num_response:5} response tokens, {len(tags):5} of stream, "
              f"{density:.3f} of all pairs: CPU s {times}", flush=True)  # fmt: skip
        found[str(num_response)] = {"cpu_seconds": taken, "tokens": len(tags), "density": density}
    for arm in ("tiles", "dense"):
        few, many = (medians(found[str(n)]["cpu_seconds"])[arm] for n in RESPONSES[-2:])
        growth = math.log(many / few) / math.log(lengths[-1] / lengths[-2])
        peak = in_fresh_process(__file__, arm, RESPONSES[-1])["peak_bytes"]
        print(f"{arm}: growth {growth:.2f}, peak {peak / 2**20:.0f} MiB", flush=True)
        found[arm] = {"growth": growth, "peak_bytes": peak}
    return write(args.out, {"results": found})


if __name__ == "__main__":
    main()
