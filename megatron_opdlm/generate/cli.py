"""`opdlm generate`: a student answers prompts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_opdlm.config.annotations import OneOf
from megatron_opdlm.diffusion.remasking import RULES, make_rule
from megatron_opdlm.generate.arguments import (
    MAX_ROWS,
    Parsers,
    add_model_arguments,
    add_parameter_arguments,
    check_arguments,
    decoding_options,
    open_decoder,
    parameter_users,
    require_folder,
    require_used,
)

if TYPE_CHECKING:
    from megatron_opdlm.diffusion.trajectory import Trajectory
    from megatron_opdlm.generate.decoder import Decoder
    from megatron_opdlm.responses.prompts import Prompt, PromptTokens
    from megatron_opdlm.rollout.request import DecodingOptions

DEFAULT_RULE = "low_confidence_static"
STEP_SECONDS = 0.06
"""Shortest time that a step of --show-steps is visible in a terminal. Small models would be too
fast to follow."""


def add_generate_parser(subparsers: Parsers[argparse.ArgumentParser]) -> None:
    """Adds the command `generate`. It sets `args.run`, a function from args to the exit status."""
    parser = subparsers.add_parser(
        "generate",
        help="answer prompts with a student",
        description="Decode prompts block by block. It also runs under torchrun, with the same "
        "arguments.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="one user turn")
    source.add_argument("--prompts", metavar="FILE", help="prompt file, JSONL or JSON")
    add_model_arguments(parser)
    parser.add_argument(
        "--remasking",
        choices=tuple(RULES),
        default=DEFAULT_RULE,
        help="positions that become tokens at a denoising step, with n = block size / denoising "
        "steps: "
        f"{OneOf(RULES).describe()}; default: {DEFAULT_RULE}".replace("%", "%%"),
    )
    add_parameter_arguments(parser, several=False)
    parser.add_argument("--seed", type=int, metavar="N", help="with a temperature; default: 0")
    parser.add_argument(
        "--show-steps", action="store_true", help="draw the denoising, one response at a time"
    )
    parser.add_argument("--out", metavar="JSONL", help="write the responses to this file")
    parser.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> int:
    """Runs `opdlm generate`."""
    from megatron_opdlm.convert.model_source import ModelSource
    from megatron_opdlm.distributed import process_groups
    from megatron_opdlm.responses.rendering import check_rendering

    _check(args)
    prompts = _read_prompts(args)
    given = {name: getattr(args, name) for name in parameter_users()}
    parameters = {name: value for name, value in given.items() if value is not None}
    source = ModelSource.open(args.model)
    options = decoding_options(args, source, make_rule(args.remasking, **parameters))
    check_rendering(prompts, source, enable_thinking=args.enable_thinking)
    decoder = open_decoder(args, max_rows=1 if args.show_steps else args.max_rows or MAX_ROWS)
    _generate(args, decoder, options, prompts)
    # Only after success: this is a collective, and would wait for ranks that failed.
    process_groups.shutdown()
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses, before any work, arguments that are out of range or have no effect."""
    check_arguments(args, "seed")
    for name, rules in parameter_users().items():
        is_used, here = args.remasking in rules, f"remasking={args.remasking}"
        about = " or ".join(f"remasking={rule}" for rule in rules)
        require_used(is_used, name, getattr(args, name), about, here)
    several, here = "decoding many responses at once", "one after the other (--show-steps)"
    require_used(not args.show_steps, "max_rows", args.max_rows, several, here)
    if args.out is not None:
        require_folder(args.out, "--out")


def _read_prompts(args: argparse.Namespace) -> list[Prompt]:
    from megatron_opdlm.responses.prompts import Prompt, load_prompts

    if args.prompts is not None:
        return load_prompts(args.prompts)
    if not args.prompt.strip():
        raise ValueError("--prompt is empty; write what the user asks")
    return [Prompt(id="1", messages=[{"role": "user", "content": args.prompt}], where="--prompt")]


def _generate(
    args: argparse.Namespace,
    decoder: Decoder,
    options: DecodingOptions,
    prompts: Sequence[Prompt],
) -> None:
    import time

    kept = decoder.tokenize(
        prompts,
        options,
        response_limit=args.max_new_tokens,
        enable_thinking=args.enable_thinking,
    ).kept
    start = time.perf_counter()
    trajectories = _decode(args, decoder, options, kept)
    seconds = time.perf_counter() - start
    if not decoder.parallel.is_main:
        return
    texts = decoder.student.tokenizer.batch_decode(
        [trajectory.text_ids.tolist() for trajectory in trajectories], skip_special_tokens=True
    )
    _report(trajectories, texts, seconds)
    if args.out is not None:
        questions = [prompts[prompt.index] for prompt in kept]
        write_responses(args.out, questions, trajectories, texts)


def _decode(
    args: argparse.Namespace,
    decoder: Decoder,
    options: DecodingOptions,
    prompts: Sequence[PromptTokens],
) -> list[Trajectory]:
    from rich.console import Console
    from tqdm import tqdm

    from megatron_opdlm.generate.display import DenoisingDisplay

    limit, seed = args.max_new_tokens, args.seed or 0
    if not args.show_steps:
        total = len(prompts)
        hide = not decoder.parallel.is_main or total == 1
        with tqdm(total=total, desc="responses", disable=hide) as bar:
            return decoder.decode(
                prompts,
                options,
                response_limit=limit,
                seed=seed,
                on_progress=lambda done: bar.update(done - bar.n),
            )
    console = Console(quiet=not decoder.parallel.is_main)
    lengths = [len(prompt.ids) for prompt in prompts]
    with DenoisingDisplay(
        decoder.student.tokenizer, lengths, console=console, seconds_per_step=STEP_SECONDS
    ) as display:
        return decoder.decode(prompts, options, response_limit=limit, seed=seed, observer=display)


def _report(trajectories: Sequence[Trajectory], texts: Sequence[str], seconds: float) -> None:
    """Prints every response, and one line about all of them."""
    from rich.console import Console

    from megatron_opdlm.rollout.engine import tokens_per_forward

    console = Console(highlight=False, markup=False, soft_wrap=True)
    for trajectory, text in zip(trajectories, texts, strict=True):
        if len(trajectories) > 1:
            console.print(f"--- {trajectory.prompt_id}", style="bold")
        console.print(text)
    tokens = sum(trajectory.num_response_tokens for trajectory in trajectories)
    passes = sum(trajectory.num_passes for trajectory in trajectories)
    console.print(
        f"{tokens} tokens, {passes} denoising passes, "
        f"{tokens_per_forward(trajectories):.2f} tokens per forward, {seconds:.2f} s, "
        f"{tokens / seconds:.1f} tokens per second",
        style="dim",
    )


def write_responses(
    path: str,
    questions: Sequence[Prompt],
    trajectories: Sequence[Trajectory],
    texts: Sequence[str],
) -> None:
    """Writes responses as JSON lines. The file appears only when it is complete."""
    from megatron_opdlm.files.folders import replacing

    with replacing(Path(path)) as partial, open(partial, "w", encoding="utf-8") as file:
        for question, trajectory, text in zip(questions, trajectories, texts, strict=True):
            file.write(json.dumps(response_record(question, trajectory, text)) + "\n")


def response_record(question: Prompt, trajectory: Trajectory, text: str) -> dict[str, Any]:
    """Returns one line of the output file.

    `commit_step` has one entry per decoded position. The last block is decoded whole, so there may
    be more entries than response tokens.
    """
    return {
        "prompt_id": trajectory.prompt_id,
        "prompt": question.messages[-1]["content"],
        "response": text,
        "tokens": trajectory.num_response_tokens,
        "passes": trajectory.num_passes,
        "ended": trajectory.ended,
        "block_size": trajectory.block_size,
        "num_prompt_tokens": len(trajectory.prompt_ids),
        "response_ids": trajectory.response_ids.tolist(),
        "commit_step": trajectory.commit_step.tolist(),
    }
