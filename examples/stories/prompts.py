"""Cuts prompts from a text of stories: the first words of its paragraphs.

    prompts.py --text FILE --out DIR

Writes DIR/train.jsonl and DIR/heldout.jsonl, which share no prompt. Responses are never needed.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from megatron_opdlm.checks import require, require_at_least
from megatron_opdlm.cli import run_script
from megatron_opdlm.files.folders import replacing
from megatron_opdlm.files.paths import require_file

WORDS = (3, 14)
"""Shortest and longest prompt."""
FEWEST_WORDS = 16
"""Of a paragraph that is used: shorter ones are ends of stories."""


def cut_prompts(text: str, seed: int = 0) -> list[str]:
    """Returns the beginnings of the paragraphs in a random order, each once."""
    paragraphs = [paragraph.split() for paragraph in text.split("\n\n")]
    paragraphs = [words for words in paragraphs if len(words) >= FEWEST_WORDS]
    generator = random.Random(seed)
    generator.shuffle(paragraphs)
    prompts = [" ".join(words[: generator.randint(*WORDS)]) for words in paragraphs]
    return list(dict.fromkeys(prompts))


def main() -> None:
    """Writes the two files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", required=True, type=Path, help="paragraphs, empty lines between")
    parser.add_argument("--out", required=True, type=Path, help="folder for the two files")
    parser.add_argument("--heldout", type=int, default=128, help="prompts to keep; default: 128")
    args = parser.parse_args()
    require_at_least(1, "--heldout", args.heldout)
    require_file("--text", args.text)
    try:
        prompts = cut_prompts(args.text.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"--text={args.text} is not UTF-8 text (byte {error.start})") from None
    rule = f"gives {len(prompts)} prompts and must give over {2 * args.heldout}"
    fix = "give a longer text, with empty lines between its paragraphs"
    require(len(prompts) > 2 * args.heldout, "--text", args.text, rule, fix)
    parts = {"heldout": prompts[: args.heldout], "train": prompts[args.heldout :]}
    for name, part in parts.items():
        lines = [json.dumps({"id": f"{name}{i}", "prompt": text}) for i, text in enumerate(part)]
        with replacing(args.out / f"{name}.jsonl") as partial:
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(", ".join(f"{len(part)} prompts in {name}.jsonl" for name, part in parts.items()))


if __name__ == "__main__":
    run_script(main)
