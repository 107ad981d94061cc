"""How likely are a student's stories to its teacher?

    score.py --model DIR --out DIR

Scores the responses that stories.sh left in DIR with transformers: minus log probability per token
under the teacher, given prompt and what comes before. The teacher continues the same prompts at the
same temperature for comparison. Writes DIR/scores.json and DIR/report.md.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_opdlm.cli import run_script
from megatron_opdlm.files.folders import replacing

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of its response."""
NAMES = {
    "teacher": "teacher, autoregressive",
    "before": "student before training, static",
    "static": "student, static",
    "dynamic": "student, dynamic, threshold 0.9",
}
SHOWN = 3
"""Stories of each kind in the report."""


@dataclass(frozen=True)
class Score:
    """One decoding at one temperature."""

    name: str
    temperature: float
    nll: float
    """Nats per token, mean over all tokens."""
    error: float
    """Standard error of it, over prompts."""
    num_tokens: int
    tokens_per_forward: float
    stories: list[str]


def main() -> None:
    """Scores every file and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="the teacher, a Hugging Face directory")
    parser.add_argument("--out", required=True, type=Path, help="folder of stories.sh")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = AutoModelForCausalLM.from_pretrained(args.model).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    scores = []
    for path in sorted(args.out.glob("before.*.jsonl")):
        temperature = float(path.name.removeprefix("before.").removesuffix(".jsonl"))
        records = {
            name: read_lines(args.out / path.name.replace("before", name))
            for name in ("before", "static", "dynamic")
        }
        prompts = [tokenizer(record["prompt"]).input_ids for record in records["before"]]
        lengths = [record["tokens"] for record in records["static"]]
        own = continue_prompts(teacher, prompts, max(lengths), temperature)
        scores.append(score("teacher", temperature, teacher, tokenizer, own, 1.0))
        for name, lines in records.items():
            pairs = [
                (prompt, line["response_ids"][: line["tokens"]])
                for prompt, line in zip(prompts, lines, strict=True)
            ]
            speed = sum(len(a) for _, a in pairs) / sum(line["passes"] for line in lines)
            scores.append(score(name, temperature, teacher, tokenizer, pairs, speed))
    figures = json.dumps([asdict(s) for s in scores], indent=1)
    for name, content in (("scores.json", figures), ("report.md", report(scores))):
        with replacing(args.out / name) as partial:  # a report that is there is a finished run
            partial.write_text(content, encoding="utf-8")
    print(table(scores))
    print(f"with stories: {args.out / 'report.md'}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines of `opdlm generate`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def continue_prompts(
    teacher: Any, prompts: list[list[int]], num_tokens: int, temperature: float
) -> list[Pair]:
    """The teacher's own continuations, `num_tokens` each, unfiltered."""
    torch.manual_seed(0)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    pairs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = teacher.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, pad_token_id=0,
            **sampling,
        )  # fmt: skip
        pairs.append((prompt, out[0, len(prompt) :].tolist()))
    return pairs


@torch.no_grad()
def score(
    name: str, temperature: float, teacher: Any, tokenizer: Any, pairs: list[Pair], speed: float
) -> Score:
    """Minus log probability per token of all responses."""
    sums, counts = [], []
    for prompt, response in pairs:
        ids = torch.tensor([prompt + response])
        log_probabilities = teacher(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        chosen = log_probabilities.gather(1, torch.tensor(response)[:, None])
        sums.append(-float(chosen.sum()))
        counts.append(len(response))
    means = torch.tensor(sums) / torch.tensor(counts)
    return Score(
        name=name,
        temperature=temperature,
        nll=sum(sums) / sum(counts),
        error=float(means.std()) / math.sqrt(len(means)),
        num_tokens=sum(counts),
        tokens_per_forward=speed,
        stories=[tokenizer.decode(p + r, skip_special_tokens=True) for p, r in pairs[:SHOWN]],
    )


def table(scores: list[Score]) -> str:
    """Markdown: a row per decoding and temperature, with the distance from the teacher's own."""
    own = {s.temperature: s.nll for s in scores if s.name == "teacher"}
    lines = [
        "| temperature | text of | nats per token under the teacher | more than the teacher's own "
        "| tokens per forward |",
        "|---|---|---|---|---|",
    ]
    for s in scores:
        more = "" if s.name == "teacher" else f"{s.nll - own[s.temperature]:+.2f}"
        lines.append(
            f"| {s.temperature:g} | {NAMES[s.name]} | {s.nll:.2f} ± {s.error:.2f} | {more} "
            f"| {s.tokens_per_forward:.2f} |"
        )
    return "\n".join(lines)


def report(scores: list[Score]) -> str:
    """The table, and stories of each kind."""
    parts = ["# Stories", table(scores)]
    for s in scores:
        parts.append(f"## {NAMES[s.name]}, temperature {s.temperature:g}")
        parts += ["> " + story.replace("\n", "\n> ") for story in s.stories]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    run_script(main)
