"""Compares greedy decoding of the imported model with transformers, token for token.

    check_greedy.py --model CKPT --hf DIR --prompts FILE [--tensor-parallel N,N]

A student that was not trained yet is the autoregressive model: in blocks of one token whose outputs
predict the next position, `opdlm generate` must give what transformers' generate() gives. The model
is cut over N processes, once for every N. The differences are counted; the status is 0 if there are
none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_opdlm.checks import require, require_at_least
from megatron_opdlm.cli import list_of, run_script
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.files.folders import read_json_object
from megatron_opdlm.files.paths import require_file
from megatron_opdlm.responses.prompts import Prompt, load_prompts


def main() -> int:
    """Compares, prints, and returns the exit status."""
    args = parse_arguments()
    check(args)
    prompts = load_prompts(args.prompts)[: args.num_prompts]
    expected, closest = transformers_answers(args.hf, prompts, args.max_new_tokens)
    print(f"transformers: the two likeliest tokens are never nearer than {closest:.1e} logits")
    failed = False
    for size in args.tensor_parallel:
        found = our_answers(args.model, prompts, args.max_new_tokens, size)
        equal = sum(found.get(name) == answer for name, answer in expected.items())
        tokens = sum(map(len, expected.values()))
        text = f"{equal} of {len(expected)} responses ({tokens} tokens) are equal"
        print(f"tensor parallel {size}: {text}", flush=True)
        failed |= equal < len(expected)
    return int(failed)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="imported model")
    parser.add_argument("--hf", required=True, type=Path, help="directory that it was made of")
    parser.add_argument("--prompts", required=True, help="prompt file")
    parser.add_argument("--num-prompts", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="default: 32")
    sizes = list_of(int, "numbers")
    parser.add_argument(
        "--tensor-parallel", type=sizes, default=[1], metavar="N,N", help="default: 1"
    )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuses wrong arguments before any model is loaded.

    Raises:
        ValueError: the message names argument, value, rule and fix.
    """
    for name in ("--num-prompts", "--max-new-tokens"):
        require_at_least(1, name, getattr(args, name[2:].replace("-", "_")))
    require_file("--prompts", args.prompts)
    config = read_json_object(args.hf / "config.json")
    heads = config.get("num_key_value_heads", config.get("num_attention_heads"))
    for size in args.tensor_parallel:
        require_at_least(1, "--tensor-parallel", size)
        if isinstance(heads, int):
            rule = f"must divide the {heads} key/value heads of {args.hf}"
            sizes = [str(n) for n in range(1, heads + 1) if heads % n == 0]
            fix = f"use some of {', '.join(sizes)}"
            require(heads % size == 0, "--tensor-parallel", size, rule, fix)
    ModelSource.open(args.model)


def transformers_answers(
    folder: Path, prompts: list[Prompt], limit: int
) -> tuple[dict[str, list[int]], float]:
    """Returns the response of every prompt, and the smallest gap between two likeliest logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers, closest = {}, float("inf")
    for prompt in prompts:
        inputs: Any = tokenizer.apply_chat_template(
            list(prompt.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(
            **inputs, max_new_tokens=limit, do_sample=False, output_scores=True,
            return_dict_in_generate=True, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        answers[prompt.id] = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        best = torch.cat(output.scores).topk(2).values
        closest = min(closest, float((best[:, 0] - best[:, 1]).min()))
    return answers, closest


def our_answers(model: str, prompts: list[Prompt], limit: int, size: int) -> dict[str, list[int]]:
    """Returns the response of every prompt, decoded by `opdlm generate` on `size` processes.

    Raises:
        ValueError: the command failed.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    with tempfile.TemporaryDirectory() as folder:
        file, responses = Path(folder) / "prompts.jsonl", Path(folder) / "responses.jsonl"
        lines = (json.dumps({"id": p.id, "messages": list(p.messages)}) for p in prompts)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [
            sys.executable, *(torchrun if size > 1 else []), "-m", "megatron_opdlm", "generate",
            "--model", model, "--prompts", str(file), "--out", str(responses),
            "--block-size", "1", "--denoising-steps", "1", "--prediction", "next_position",
            "--max-new-tokens", str(limit), "--params-dtype", "float32",
            "--tensor-model-parallel-size", str(size),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            lines_of = [line for line in result.stderr.splitlines() if line.strip()]
            why = next((text for text in lines_of if "error:" in text), "an error without a text")
            raise ValueError(f"opdlm generate on {size} processes ended with: {why}")
        records = [json.loads(line) for line in responses.read_text("utf-8").splitlines()]
    return {r["prompt_id"]: r["response_ids"][: r["tokens"]] for r in records}


if __name__ == "__main__":
    run_script(main)
