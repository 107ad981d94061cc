"""Reloads the export with transformers and compares it with the trained student.

    check.py --run DIR --export DIR --prompts FILE --out FILE

The logits under the block-causal mask must be equal to 1e-3; the greedy responses of the export's
own generate() are counted that are the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from megatron_opdlm.checks import require, require_at_least
from megatron_opdlm.cli import run_script
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.files.folders import read_json_object, replacing, write_json
from megatron_opdlm.files.paths import require_file
from megatron_opdlm.generate.arguments import require_folder

MODEL_CLASS = "AutoModelForMaskedLM"
"""By which transformers finds the model of an a2d export."""

sys.path.append(str(Path(__file__).resolve().parents[1] / "quickstart"))


class BlockCausal:
    """An a2d export under its block-causal mask.

    Without a mask its forward pass is bidirectional, as that format wants it.
    """

    def __init__(self, folder: Path) -> None:
        """Loads the export with its own modelling code, as any user of transformers would."""
        from transformers import AutoModelForMaskedLM

        self.model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
        self.model.float().eval()
        self.generate = self.model.generate

    def __call__(self, token_ids: torch.Tensor) -> Any:
        """The model's output for [1, S] tokens."""
        blocks = torch.arange(token_ids.shape[1]) // self.model.config.block_size
        return self.model(token_ids, attention_mask=(blocks[:, None] >= blocks)[None, None])


def main() -> None:
    """Compares and writes the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, type=Path, help="run folder")
    parser.add_argument("--export", required=True, type=Path, help="its export")
    parser.add_argument("--prompts", required=True, help="held-out prompts")
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write")
    parser.add_argument("--num-prompts", type=int, default=8, help="default: 8")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="default: 32")
    args = parser.parse_args()
    check(args)
    with tempfile.TemporaryDirectory() as modules:
        os.environ |= {
            # transformers copies the export's code there; the user's cache stays as it is.
            "HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
            # Transformer Engine rounds products of float32 to TF32 unless the driver forbids it.
            "NVIDIA_TF32_OVERRIDE": "0",
        }  # fmt: skip
        warnings.simplefilter("ignore")
        from check_export import check_export

        found = check_export(
            BlockCausal(args.export),
            args.run,
            args.prompts,
            num_questions=args.num_prompts,
            response_limit=args.max_new_tokens,
        )
    found.require_equal()
    with replacing(args.out) as partial:
        write_json(partial, dataclasses.asdict(found))
    print(found)


def check(args: argparse.Namespace) -> None:
    """Refuses wrong arguments before any model is loaded.

    Raises:
        ValueError: the message names argument, value, rule and fix.
    """
    for name in ("--num-prompts", "--max-new-tokens"):
        require_at_least(1, name, getattr(args, name[2:].replace("-", "_")))
    require_file("--prompts", args.prompts)
    require_folder(str(args.out), "--out")
    fix = "give what `opdlm convert export --format a2d` wrote"
    require(args.export.is_dir(), "--export", args.export, "is no folder", fix)
    names = read_json_object(args.export / "config.json").get("auto_map")
    is_export = isinstance(names, dict) and MODEL_CLASS in names
    require(is_export, "--export", args.export, f"has no {MODEL_CLASS} of its own", fix)
    ModelSource.open(args.run)


if __name__ == "__main__":
    run_script(main)
