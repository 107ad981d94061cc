"""Cuts prompts from a text of stories: the first words of its paragraphs.

    prompts.py --text FILE --out DIR

Writes DIR/train.jsonl and DIR/heldout.jsonl, which share no prompt. Responses are never needed.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

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
    prompts = cut_prompts(args.text.read_text(encoding="utf-8"))
    if len(prompts) <= 2 * args.heldout:
        parser.error(f"{args.text} gives {len(prompts)} prompts; needs over {2 * args.heldout}")
    parts = {"heldout": prompts[: args.heldout], "train": prompts[args.heldout :]}
    for name, part in parts.items():
        lines = [json.dumps({"id": f"{name}{i}", "prompt": text}) for i, text in enumerate(part)]
        (args.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(", ".join(f"{len(part)} prompts in {name}.jsonl" for name, part in parts.items()))


if __name__ == "__main__":
    main()
