"""`opdlm generate`: responses of a student to your prompts."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_opdlm.data import Prompt, PromptTokens
    from megatron_opdlm.decoder import Decoder
    from megatron_opdlm.rollout.request import DecodingOptions
    from megatron_opdlm.trajectory import Trajectory

# Of denoise.REMASKING, which imports torch; the parser must not.
REMASKING = (
    "low_confidence_static",
    "low_confidence_dynamic",
    "entropy_bounded",
    "sequential",
)
STEP_SECONDS = 0.06
"""Least time that a step of --show-steps stays in a terminal: small models outrun the eye."""

Parsers = argparse._SubParsersAction  # the type of argparse's `subparsers`


def add_generate_parser(subparsers: Parsers[argparse.ArgumentParser]) -> None:
    """Adds `generate`; it sets `run(args) -> exit status`."""
    parser = subparsers.add_parser(
        "generate",
        help="answer prompts with a student",
        description="Decode block by block. Also under torchrun, with the same arguments.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="one user turn")
    source.add_argument("--prompts", metavar="FILE", help="prompt file, JSONL or JSON")
    add_model_arguments(parser)
    parser.add_argument(
        "--remasking", choices=REMASKING, default=REMASKING[0], help=f"default: {REMASKING[0]}"
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.9,
        metavar="P",
        help="low_confidence_dynamic keeps every token more probable than this; default: 0.9",
    )
    parser.add_argument(
        "--entropy-bound",
        type=float,
        default=0.35,
        metavar="E",
        help="entropy_bounded keeps tokens whose entropies sum to less, in nats; default: 0.35",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--show-steps", action="store_true", help="draw the denoising, one response at a time"
    )
    parser.add_argument("--out", metavar="JSONL", help="write the responses to this file")
    parser.set_defaults(run=run_generate)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `generate` and `eval` share: which student, and how it decodes."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_CKPT",
        help="run folder, checkpoint, or Hugging Face directory",
    )
    parser.add_argument(
        "--import-cache",
        metavar="DIR",
        help="where a Hugging Face directory is converted, once for all that name the same DIR "
        "(training: import_cache); default: a temporary folder, removed once it is loaded",
    )
    parser.add_argument(
        "--block-size", type=int, metavar="K", help="default: what the student was trained for"
    )
    parser.add_argument(
        "--denoising-steps", type=int, metavar="N", help="most steps per block; default: block size"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="default: 0, all tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: 1, all")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: 256")
    parser.add_argument(
        "--enable-thinking", action="store_true", help="let the chat template ask for thoughts"
    )
    parser.add_argument(
        "--max-rows",
        type=int,
        default=256,
        metavar="N",
        help="most responses decoded at once on a data-parallel rank; default: 256",
    )
    parser.add_argument(
        "--kv-cache-gb",
        type=float,
        metavar="GB",
        help="most memory for keys and values on a rank; default: 80%% of a GPU's free memory, 4.3 "
        "on a CPU",
    )
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="capture decoding passes as CUDA graphs, once per size: for small models or few rows, "
        "whose kernels run faster than a host starts them; needs CUDA and bfloat16",
    )
    parser.add_argument(
        "--params-dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="default: bfloat16 on CUDA, else float32",
    )
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N")


def open_decoder(args: argparse.Namespace, *, max_rows: int) -> Decoder:
    """Loads the student that the arguments name. Call on all ranks."""
    from megatron_opdlm.decoder import Decoder

    for name in ("max_new_tokens", "max_rows"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)} must be at least 1")
    if args.kv_cache_gb is not None and not args.kv_cache_gb > 0:
        raise ValueError(f"kv_cache_gb={args.kv_cache_gb} must be above 0")
    return Decoder.open(
        args.model,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        params_dtype=args.params_dtype,
        max_rows=max_rows,
        kv_cache_gb=args.kv_cache_gb,
        cuda_graphs=args.cuda_graphs,
        import_cache=args.import_cache,
    )


def decoding_options(
    args: argparse.Namespace, decoder: Decoder, *, remasking: str, **limits: float
) -> DecodingOptions:
    """Reads decoding options from arguments, with defaults of the student's.

    Args:
        args: those of `add_model_arguments`.
        decoder: the student.
        remasking: rule.
        limits: confidence_threshold, entropy_bound.
    """
    from megatron_opdlm.rollout.request import DecodingOptions

    block_size = decoder.block_size if args.block_size is None else args.block_size
    steps = block_size if args.denoising_steps is None else args.denoising_steps
    return DecodingOptions(
        block_size=block_size,
        denoising_steps=steps,
        remasking=remasking,
        **limits,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
    )


def run_generate(args: argparse.Namespace) -> int:
    """Runs `opdlm generate`."""
    from megatron_opdlm import parallel

    prompts = _read_prompts(args)
    if args.out is not None:
        require_folder(args.out, "--out")
    decoder = open_decoder(args, max_rows=1 if args.show_steps else args.max_rows)
    _generate(args, decoder, prompts)
    # Only after success: leaving the groups is collective, and would wait for ranks that failed.
    parallel.shutdown()
    return 0


def require_folder(path: str, name: str) -> None:
    """Refuses an output file whose folder is missing, before any work."""
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{name}={path}: there is no folder {Path(path).parent}; make it first")


def _read_prompts(args: argparse.Namespace) -> list[Prompt]:
    from megatron_opdlm.data import Prompt, load_prompts

    if args.prompts is not None:
        return load_prompts(args.prompts)
    if not args.prompt.strip():
        raise ValueError("--prompt is empty; write what the user asks")
    return [Prompt(id="1", messages=[{"role": "user", "content": args.prompt}], line=1)]


def _generate(args: argparse.Namespace, decoder: Decoder, prompts: Sequence[Prompt]) -> None:
    import time

    options = decoding_options(
        args,
        decoder,
        remasking=args.remasking,
        confidence_threshold=args.confidence_threshold,
        entropy_bound=args.entropy_bound,
    )
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

    from megatron_opdlm.display import DenoisingDisplay

    limit, seed = args.max_new_tokens, args.seed
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
    """Prints every response, and one line for all of them."""
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
    """Writes responses as JSON lines; the file appears when it is complete."""
    partial = Path(f"{path}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        for question, trajectory, text in zip(questions, trajectories, texts, strict=True):
            file.write(json.dumps(response_record(question, trajectory, text)) + "\n")
    os.replace(partial, path)


def response_record(question: Prompt, trajectory: Trajectory, text: str) -> dict[str, Any]:
    """Returns one line of the output file.

    `commit_step` has one entry per decoded position: the last block is decoded whole, so it may be
    longer than the response.
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
