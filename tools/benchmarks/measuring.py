"""What the benchmarks share: arms in turn, peak memory, numbers that must agree, the JSON file."""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 2752,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "initializer_range": 0.06,
    "torch_dtype": "float32",
    "eos_token_id": 1,
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_act": "silu",
    "attention_bias": False,
}
"""A Qwen3 whose LM head has the share of the work that it has in Qwen3-8B."""


def in_turn(arms: Mapping[Any, Callable[[], Any]], repeats: int) -> dict[Any, list[float]]:
    """CPU seconds of every arm, A B A B. The first call of each, which checks it, came before.

    User and system time of the process: steadier than seconds on a machine that others use.
    """
    taken: dict[Any, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            start = time.process_time()
            arm()
            taken[name].append(time.process_time() - start)
    return taken


def medians(taken: Mapping[Any, list[float]]) -> dict[Any, float]:
    """The median of every arm."""
    return {name: median(values) for name, values in taken.items()}


def status_bytes(field: str) -> int:
    """A number of /proc/self/status: VmRSS is the memory of this process, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def peak_above(work: Callable[[], Any]) -> tuple[Any, int]:
    """What `work` returns, and its highest memory above what the process held before it, in bytes.

    Linux forgets the peaks of the set-up when 5 is written to clear_refs.
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = status_bytes("VmRSS")
    result = work()
    return result, status_bytes("VmHWM") - before


def free_bytes() -> int:
    """Memory that this machine can still give."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def in_fresh_process(file: str, *arguments: object) -> dict[str, Any]:
    """Runs `file --run-arm ...` and returns the JSON of its last line."""
    command = [sys.executable, file, "--run-arm", *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{' '.join(command[1:])} failed:\n{process.stderr}")
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


def must_agree(
    what: str, numbers: Mapping[Any, Mapping[str, float]], tolerance: float = 1e-5
) -> None:
    """Exits unless every arm has the numbers of the first one."""
    first, expected = next(iter(numbers.items()))
    for name, found in numbers.items():
        for key, value in expected.items():
            if not math.isclose(found[key], value, rel_tol=tolerance):  # nan is close to nothing
                sys.exit(f"{what}: {key} of {name} is {found[key]}, of {first} {value}")


def parser(description: str, repeats: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    result = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    text = f"measurements of every arm; default: {repeats}"
    result.add_argument("--repeats", type=int, default=repeats, metavar="N", help=text)
    result.add_argument("--out", type=Path, metavar="FILE", help="write all numbers as JSON")
    return result


def write(path: Path | None, results: Mapping[str, Any]) -> None:
    """Writes results, machine and versions."""
    if path is None:
        return
    names = ("torch", "transformers", "megatron-core")
    about = {
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
        "versions": {name: version(name) for name in names},
    }
    path.write_text(json.dumps(about | results, indent=2) + "\n", encoding="utf-8")
