"""How fast weights are converted, next to transformers reading and writing the same files.

python tools/benchmarks/convert.py                      # Qwen3-0.6B, needs 5 GB of disk
python tools/benchmarks/convert.py --layers 2 --repeats 1
python tools/benchmarks/convert.py --config Qwen3-8B --out convert.json

A model with random bfloat16 weights is made in a temporary folder, with a tokenizer and without.
Every arm runs in a process of its own, in turn, as often as --repeats says:

  transformers   AutoModelForCausalLM and AutoTokenizer: from_pretrained, then save_pretrained
  import         opdlm convert import: safetensors -> torch_dist
  export         opdlm convert export: torch_dist -> safetensors
  ... weights    the same of the folder without tokenizer (import: --no-mask; export: as 'base')

First of all each arm runs once and the tensors it wrote are compared bit for bit with the original
ones, by the safetensors library; arms that change weights are not worth timing.

seconds   of the work alone, after all modules are imported
command   of the whole process, from its start to its end
CPU       user and system time of the work, all threads; steadier than seconds on a shared machine
memory    highest resident memory (VmHWM) above that of the process before the work, which has
          imported the same modules and read no weights

The files are in the page cache, and no arm waits for the disk: this compares programs, not disks.
Between two runs the disk writes what the last one left. Nothing is judged: there is no time limit.
"""

import argparse
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

PROGRAMS = ("transformers", "import", "export")
ARMS = (*PROGRAMS, *(f"{program} weights" for program in PROGRAMS))
QWEN3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_TOKENS = 151669  # of its tokenizer; the mask token comes next
BLOCK_SIZE = 4


@dataclass(frozen=True)
class Measurement:
    """One run of one arm."""

    seconds: float
    command_seconds: float
    cpu_seconds: float
    memory_bytes: int


def make_model(folder: Path, config_dir: Path | None, layers: int | None) -> int:
    """Write a Hugging Face directory with random weights; returns the number of parameters."""
    import torch

    from megatron_opdlm.files.safetensors_file import SafetensorsWriter
    from megatron_opdlm.model.families import FAMILIES
    from megatron_opdlm.model.hf_config import read_config

    folder.mkdir()
    raw = QWEN3_0_6B
    if config_dir is not None:
        raw = json.loads((config_dir / "config.json").read_text(encoding="utf-8"))
        for path in config_dir.glob("*token*"):
            shutil.copyfile(path, folder / path.name)
    if layers is not None:
        raw = raw | {"num_hidden_layers": layers, "max_window_layers": layers, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    if not (folder / "tokenizer.json").is_file():
        write_tokenizer(folder, min(raw["vocab_size"] - 1, QWEN3_TOKENS))
    config = read_config(folder)
    shapes = FAMILIES[config.family].hf_shapes(config)
    tensors = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    writer = SafetensorsWriter(folder / "model.safetensors", tensors)
    for shape in shapes.values():
        values = torch.empty(shape, dtype=torch.bfloat16)
        writer.write(values.normal_(0, 0.02, generator=generator))
    writer.close()
    without_tokenizer = folder.with_name(f"{folder.name} weights")
    without_tokenizer.mkdir()
    for name in ("config.json", "model.safetensors"):
        os.link(folder / name, without_tokenizer / name)
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def write_tokenizer(folder: Path, size: int) -> None:
    """A byte-level BPE of `size` tokens: as large as a real one, and of no other use."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens, merges = list(alphabet[:size]), []
    for left in tokens:  # grows while it is read
        for right in alphabet[: size - len(tokens)]:
            tokens.append(left + right)
            merges.append((left, right))
        if len(tokens) == size:
            break
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": tokens[-1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")


def prepare_arm(arm: str, root: Path, export_format: str) -> Callable[[], None]:
    """Import everything that an arm needs, and return its work."""
    program, *weights = arm.split()
    source, out = root / " ".join(["model", *weights]), root / arm
    if program == "transformers":
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        # transformers imports a model's module when it is first looked up
        MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(source))]

        def load_and_save() -> None:
            model = AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16")
            model.save_pretrained(out)
            if not weights:
                AutoTokenizer.from_pretrained(source).save_pretrained(out)

        return load_and_save
    if program == "import":
        from megatron_opdlm.convert.importer import import_hf

        return lambda: import_hf(source, out, add_mask=not weights)
    from megatron_opdlm.convert.exporter import export

    checkpoint = root / " ".join(["import", *weights])
    if weights:
        return lambda: export(checkpoint, out, format="base")
    block_size = BLOCK_SIZE if export_format in ("sdar", "a2d") else None
    return lambda: export(checkpoint, out, format=export_format, block_size=block_size)


def run_arm(arm: str, root: Path, export_format: str) -> None:
    """In a process of its own: do an arm's work, and print what it took as a line of JSON."""
    work = prepare_arm(arm, root, export_format)
    gc.collect()
    memory, cpu, start = peak_memory(), time.process_time(), time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    cpu = time.process_time() - cpu
    found = {"seconds": seconds, "cpu_seconds": cpu, "memory_bytes": peak_memory() - memory}
    print(json.dumps(found))


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def measure(arm: str, root: Path, export_format: str) -> Measurement:
    """Run an arm in a fresh process, on a quiet disk."""
    shutil.rmtree(root / arm, ignore_errors=True)
    os.sync()
    command = [sys.executable, __file__, "--run-arm", arm, str(root), "--format", export_format]
    start = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True)
    elapsed = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{arm} failed:\n{process.stderr}")
    found = json.loads(process.stdout.splitlines()[-1])
    return Measurement(command_seconds=elapsed, **found)


def check_equal(found_dir: Path, original_dir: Path) -> None:
    """Exit unless both directories hold the same tensors, bit for bit."""
    import torch
    from safetensors import safe_open

    found = {
        name: path
        for path in sorted(found_dir.glob("*.safetensors"))
        for name in safe_open(path, "pt").keys()  # noqa: SIM118  (not a dict)
    }
    original = safe_open(original_dir / "model.safetensors", "pt")
    if found.keys() != set(original.keys()):
        sys.exit(f"{found_dir}: other tensors: {sorted(found.keys() ^ set(original.keys()))[:5]}")
    for name, path in found.items():
        tensor, expected = safe_open(path, "pt").get_tensor(name), original.get_tensor(name)
        same_kind = tensor.dtype == expected.dtype and tensor.shape == expected.shape
        if not same_kind or not torch.equal(tensor.view(torch.int16), expected.view(torch.int16)):
            sys.exit(f"{found_dir}: {name} differs from the original")


def table(runs: dict[str, list[Measurement]]) -> str:
    """Medians, with the smallest in brackets, and peak memory."""
    lines = [f"{'':22}{'seconds':>16}{'command':>16}{'CPU':>16}{'memory GB':>12}"]
    for arm, taken in runs.items():
        columns = [
            f"{median(values):.2f} ({min(values):.2f})"
            for values in (
                [run.seconds for run in taken],
                [run.command_seconds for run in taken],
                [run.cpu_seconds for run in taken],
            )
        ]
        memory = max(run.memory_bytes for run in taken) / 1e9
        lines.append(f"{arm:22}" + "".join(f"{text:>16}" for text in columns) + f"{memory:12.2f}")
    return "\n".join(lines)


def benchmark(args: argparse.Namespace) -> None:
    """Make the model, check the arms, measure them, report."""
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="convert-benchmark-") as folder:
        root = Path(folder)
        parameters = make_model(root / "model", args.config, args.layers)
        print(f"{parameters:,} parameters, {2 * parameters / 1e9:.2f} GB of bfloat16", flush=True)
        for arm in ARMS:
            measure(arm, root, args.format)
        for arm in (arm for arm in ARMS if not arm.startswith("import")):
            check_equal(root / arm, root / "model")
        print("all arms keep every bit; medians (and minima) of", args.repeats, "runs", flush=True)
        runs: dict[str, list[Measurement]] = {arm: [] for arm in ARMS}
        for _ in range(args.repeats):
            for arm in ARMS:
                runs[arm].append(measure(arm, root, args.format))
    print(table(runs))
    if args.out is not None:
        result = {
            "parameters": parameters,
            "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
            "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
            "runs": {arm: [asdict(run) for run in taken] for arm, taken in runs.items()},
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="DIR",
        help="folder with a config.json and, if there is one, a tokenizer; default: the sizes of "
        "Qwen3-0.6B and a made-up tokenizer as large",
    )
    parser.add_argument("--layers", type=int, metavar="N", help="default: as the config says")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--format", default="base", help="of the export; default: base")
    parser.add_argument(
        "--dir", type=Path, help="where the temporary folder goes; needs four times the weights"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all measurements as JSON")
    parser.add_argument("--run-arm", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_arm is not None:
        run_arm(args.run_arm[0], Path(args.run_arm[1]), args.format)
    else:
        benchmark(args)


if __name__ == "__main__":
    main()
