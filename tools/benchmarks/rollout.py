"""How fast responses are decoded, next to other engines' methods on the same weights.

python tools/benchmarks/rollout.py                       # about 8 minutes on one core
python tools/benchmarks/rollout.py --sections commit growth --repeats 5 --out rollout.json

One process, one thread, float32, random weights; a Qwen3 of 8 layers whose LM head has the share of
the work that it has in Qwen3-8B. Greedy, 2 tokens per denoising step. The arms run in turn,
A B A B, as often as --repeats says, after a gate: all arms of a section decode the same tokens.

  methods   8 rows of 200 prompt and 256 response tokens, blocks of 4:
            engine, separate commit (JetEngine, LMDeploy, SGLang), prefix per block (dLLM,
            Fast-dLLM), full recompute (LLaDA, Dream); see tests/decoding_references.py
  commit    engine and separate commit, 1 row and 8 rows
  growth    engine, 8 rows: cost per token when 128 tokens are generated, and 1,024
  batching  48 requests through 8 slots, response lengths 10:1 (log-uniform): continuous batching,
            batch after batch, and batch after batch with finished rows computed to the end
  handover  160 million parameters trained in two shards, rolled out in two replicas: the weights
            handed over in memory, and through a safetensors file that rank 0 writes (it is given
            them whole) and both read; seconds, two processes

CPU time is user and system time of the process: steadier than seconds on a shared machine. Ratios
are of medians. Next to it stands the work, counted. Nothing is judged.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from measuring import CONFIG

from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.distributed import process_groups
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.model.gpt import BlockDiffusionModel, BuildOptions, build_model
from megatron_opdlm.model.hf_config import parse_config
from megatron_opdlm.rollout.decodable import Decodable
from megatron_opdlm.rollout.engine import RolloutCounts, RolloutEngine, tokens_per_forward
from megatron_opdlm.rollout.layout import RolloutLayout
from megatron_opdlm.rollout.request import DecodingOptions, Request
from tests.decoding_references import (
    decode_with,
    full_recompute,
    fused_commit,
    prefix_per_block,
    separate_commit,
)
from tests.helpers import run_ranks

MASK = 0
PROMPT_TOKENS = 200
OPTIONS = DecodingOptions(block_size=4, denoising_steps=2)

Arm = Callable[[], tuple[list[Trajectory], RolloutCounts]]


class Bench:
    """A model, and arms over it."""

    def __init__(self, repeats: int) -> None:
        """Builds nothing yet: ranks are forked from a process that is in no job."""
        self.repeats = repeats
        self.results: dict[str, Any] = {}

    @cached_property
    def parallel(self) -> ParallelState:
        """This process alone."""
        return process_groups.initialize()

    @cached_property
    def model(self) -> BlockDiffusionModel:
        """The model of all sections but `handover`."""
        torch.manual_seed(0)
        options = BuildOptions(make_vocab_size_divisible_by=1)
        return build_model(parse_config(CONFIG, {}), options, self.parallel)

    def engine(self, max_rows: int = 128) -> RolloutEngine:
        """An engine that never meets an end of sequence, so lengths are the limits."""
        return RolloutEngine(
            Decodable(
                model=self.model, parallel=self.parallel, mask_token_id=MASK, eos_token_ids=()
            ),
            OPTIONS,
            max_rows=max_rows,
        )

    def ours(self, requests: list[Request], max_rows: int = 128) -> Arm:
        """The engine as it is."""

        def run() -> tuple[list[Trajectory], RolloutCounts]:
            engine = self.engine(max_rows)
            return engine.generate(requests), engine.counts

        return run

    def lockstep(self, step: Any, batches: list[list[Request]], keep_finished: bool = False) -> Arm:
        """A reference, batch after batch."""

        def run() -> tuple[list[Trajectory], RolloutCounts]:
            engine = self.engine()
            decoded = [
                trajectory
                for batch in batches
                for trajectory in decode_with(step, engine, batch, keep_finished=keep_finished)
            ]
            return decoded, engine.counts

        return run

    def compare(self, section: str, arms: dict[str, Arm], tokens: int) -> None:
        """Checks that arms agree, measures them in turn, prints and keeps the result."""
        first = {name: arm() for name, arm in arms.items()}
        expected, _ = next(iter(first.values()))
        for name, (decoded, _) in first.items():
            for got, want in zip(decoded, expected, strict=True):
                if not torch.equal(got.token_ids, want.token_ids):
                    sys.exit(f"{section}: {name} decodes other tokens for {want.prompt_id}")
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        for _ in range(self.repeats):
            for name, arm in arms.items():
                start, cpu = time.perf_counter(), time.process_time()
                arm()
                taken[name].append((time.perf_counter() - start, time.process_time() - cpu))
        ours = median(cpu for _, cpu in next(iter(taken.values())))
        print(f"\n{section}: the same tokens from all arms")
        for name, times in taken.items():
            decoded, counts = first[name]
            wall, cpu = median(wall for wall, _ in times), median(cpu for _, cpu in times)
            print(
                f"  {name:34} {tokens / wall:8.1f} tokens/s {1e3 * cpu / tokens:8.3f} CPU ms/token "
                f"{cpu / ours:7.2f} x {counts.passes:6} passes {counts.tokens:9} tokens "
                f"{counts.head_rows:7} head rows",
                flush=True,
            )
            self.results.setdefault(section, {})[name] = {
                "seconds": [wall for wall, _ in times],
                "cpu_seconds": [cpu for _, cpu in times],
                "response_tokens": tokens,
                "tokens_per_forward": tokens_per_forward(decoded),
                "ratio": cpu / ours,
                "counts": asdict(counts),
            }


def make_requests(lengths: list[int]) -> list[Request]:
    """Requests of random prompts."""
    generator = torch.Generator().manual_seed(0)
    return [
        Request(
            prompt_id=f"p{i}",
            sample=0,
            prompt_ids=torch.randint(
                2, CONFIG["vocab_size"], (PROMPT_TOKENS,), generator=generator
            ),
            response_limit=length,
            key=i,
        )
        for i, length in enumerate(lengths)
    ]


def methods(bench: Bench) -> None:
    """Section `methods`."""
    requests = make_requests([256] * 8)
    arms = {
        "engine": bench.ours(requests),
        "separate commit": bench.lockstep(separate_commit, [requests]),
        "prefix per block": bench.lockstep(prefix_per_block, [requests]),
        "full recompute": bench.lockstep(full_recompute, [requests]),
    }
    bench.compare("methods", arms, 8 * 256)


def commit(bench: Bench) -> None:
    """Section `commit`."""
    for rows in (1, 8):
        requests = make_requests([256] * rows)
        arms = {
            "engine": bench.ours(requests),
            "separate commit": bench.lockstep(separate_commit, [requests]),
        }
        bench.compare(f"commit, {rows} rows", arms, rows * 256)


def growth(bench: Bench) -> None:
    """Section `growth`: the two lengths in turn."""
    short, long = make_requests([128] * 8), make_requests([1024] * 8)
    costs: dict[str, list[float]] = {"128": [], "1024": []}
    bench.ours(short)()
    for _ in range(bench.repeats):
        for requests in (short, long):
            cpu = time.process_time()
            bench.ours(requests)()
            length = requests[0].response_limit
            costs[str(length)].append((time.process_time() - cpu) / (8 * length))
    medians = {name: median(values) for name, values in costs.items()}
    ratio = medians["1024"] / medians["128"]
    print(f"\ngrowth: 128 tokens {1e3 * medians['128']:.3f} CPU ms/token, 1,024 tokens "
          f"{1e3 * medians['1024']:.3f}, {ratio:.2f} x", flush=True)  # fmt: skip
    bench.results["growth"] = {"cpu_seconds_per_token": costs, "ratio": ratio}


def batching(bench: Bench) -> None:
    """Section `batching`."""
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(48, generator=generator).tolist()
    uniform[:2] = [0.0, 1.0]
    requests = make_requests([round(25 * math.exp(u * math.log(10))) for u in uniform])
    batches = [requests[i : i + 8] for i in range(0, len(requests), 8)]
    arms = {
        "continuous batching": bench.ours(requests, max_rows=8),
        "static, finished rows leave": bench.lockstep(fused_commit, batches),
        "static, finished rows stay": bench.lockstep(fused_commit, batches, keep_finished=True),
    }
    bench.compare("batching", arms, sum(request.response_limit for request in requests))


WIDE = CONFIG | {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3072,
                 "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip


def hand_over(rank: int, repeats: int, folder: str) -> tuple[dict[str, list[float]], int, int]:
    """On a rank of its own: seconds of both arms, bytes of the second copy, and of one in the
    training layout.
    """
    import torch.distributed as dist
    from safetensors.torch import load_file, save_file

    parallel, hf = process_groups.initialize(tensor_model_parallel_size=2), parse_config(WIDE, {})
    options = BuildOptions(make_vocab_size_divisible_by=1)
    student = build_model(hf, options, parallel)
    layout = RolloutLayout(student, hf, options, parallel, tensor_model_parallel_size=1)
    whole, file = dict(layout.model.named_parameters()), f"{folder}/weights.safetensors"

    def through_a_file() -> None:
        if rank == 0:
            save_file({name: parameter.data for name, parameter in whole.items()}, file)
        dist.barrier()
        for name, tensor in load_file(file).items():
            whole[name].data.copy_(tensor)

    def hash_of_weights() -> int:
        return hash(tuple(float(parameter.double().sum()) for parameter in whole.values()))

    layout.refresh()
    expected = hash_of_weights()
    seconds: dict[str, list[float]] = {"in memory": [], "through a file": []}
    for _ in range(repeats + 1):  # the first of each makes buffers and the file
        for name, arm in (("in memory", layout.refresh), ("through a file", through_a_file)):
            dist.barrier()
            start = time.perf_counter()
            arm()
            dist.barrier()
            seconds[name].append(time.perf_counter() - start)
            assert hash_of_weights() == expected, name
    same = RolloutLayout(student, hf, options, parallel, tensor_model_parallel_size=None)
    same.refresh()
    return {name: taken[1:] for name, taken in seconds.items()}, layout.num_bytes, same.num_bytes


def handover(bench: Bench) -> None:
    """Section `handover`."""
    with tempfile.TemporaryDirectory() as folder:
        (seconds, num_bytes, matching), _ = run_ranks(hand_over, 2, bench.repeats, folder)
    memory, file = (median(taken) for taken in seconds.values())
    print(f"\nhandover of {num_bytes / 1e6:.0f} MB: in memory {memory:.3f} s, through a file "
          f"{file:.3f} s, {file / memory:.2f} x; layouts that match copy {matching} bytes",
          flush=True)  # fmt: skip
    bench.results["handover"] = {"seconds": seconds, "bytes": num_bytes, "ratio": file / memory}


SECTIONS = {
    "handover": handover,  # first: it forks
    "methods": methods,
    "commit": commit,
    "growth": growth,
    "batching": batching,
}


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all measurements as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args.repeats)
    for name in SECTIONS:
        if name in args.sections:
            SECTIONS[name](bench)
    if args.out is not None:
        result = {
            "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
            "versions": {name: version(name) for name in ("torch", "megatron-core")},
            "config": CONFIG,
            "options": asdict(OPTIONS),
            "results": bench.results,
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
