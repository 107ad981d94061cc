"""The part of `opdlm eval` that loads a model: it decodes every task with every setting."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.distributed import process_groups
from megatron_opdlm.evaluation.records import EvaluationFolder, default_folder
from megatron_opdlm.evaluation.report_results import show_results
from megatron_opdlm.evaluation.result import EvalResult
from megatron_opdlm.evaluation.runner import evaluate
from megatron_opdlm.evaluation.settings import chosen_rules
from megatron_opdlm.evaluation.task import Task
from megatron_opdlm.evaluation.task_arguments import load_tasks, to_json
from megatron_opdlm.evaluation.teacher import (
    Reference,
    evaluate_teacher,
    load_reference,
    open_reference,
)
from megatron_opdlm.generate.arguments import (
    MAX_ROWS,
    decoding_options,
    open_decoder,
    prompt_room,
)
from megatron_opdlm.generate.decoder import Decoder
from megatron_opdlm.responses.rendering import check_rendering
from megatron_opdlm.rollout.request import DecodingOptions


def decode_and_grade(args: argparse.Namespace) -> int:
    """Decodes, grades and reports. Call on all ranks with the same arguments."""
    tasks = load_tasks(args)
    source = ModelSource.open(args.model)
    settings = [decoding_options(args, source, rule) for rule in chosen_rules(args)]
    _require_room(args, source, tasks, settings)
    for task in tasks:
        check_rendering(task.questions, source, enable_thinking=args.enable_thinking)
    teacher = None if args.teacher is None else load_reference(args.teacher)
    decoder = open_decoder(args, max_rows=args.max_rows or MAX_ROWS)
    folder = None
    if decoder.parallel.is_main:
        about = {"model": args.model, "teacher": args.teacher} | to_json(args, tasks)
        folder = EvaluationFolder(args.out or default_folder(), about=about)
    results = []
    for result in _results(args, decoder, teacher, tasks, settings):
        results.append(result)
        if folder is not None:
            folder.add(result)
    if folder is not None:
        show_results(args, results, folder, tokenizer=decoder.student.tokenizer)
    # Only after success: this is a collective, and would wait for ranks that failed.
    process_groups.shutdown()
    return 0


def _require_room(
    args: argparse.Namespace,
    source: ModelSource,
    tasks: Sequence[Task],
    settings: Sequence[DecodingOptions],
) -> None:
    """Refuses a response limit that leaves a model no room for a prompt, before any is loaded.

    Raises:
        ValueError: see `prompt_room`.
    """
    models = [(source, options.block_size) for options in settings]
    if args.teacher is not None:
        models.append((open_reference(args.teacher), 1))
    for task in tasks:
        limit = args.max_new_tokens or task.response_limit
        for model, block_size in models:
            prompt_room(model.config.max_position_embeddings, limit, block_size)


def seeds_of(task: Task, given: Sequence[int] | None, temperature: float) -> list[int]:
    """Returns the seeds of a task: those given, or as many as its benchmark asks for.

    Greedy decoding does not depend on a seed, so it has one.
    """
    if given is not None:
        return list(given)
    return list(range(task.seeds)) if temperature > 0 else [0]


def _results(
    args: argparse.Namespace,
    decoder: Decoder,
    teacher: Reference | None,
    tasks: Sequence[Task],
    settings: Sequence[DecodingOptions],
) -> Iterator[EvalResult]:
    for task in tasks:
        response_limit = args.max_new_tokens or task.response_limit
        if teacher is not None:
            decoder.decodable.memory.drop()  # the reference may need the memory
            yield evaluate_teacher(
                teacher,
                task,
                response_limit=response_limit,
                enable_thinking=args.enable_thinking,
                progress=True,
            )
        for options in settings:
            for seed in seeds_of(task, args.seeds, options.temperature):
                yield evaluate(
                    decoder,
                    task,
                    options,
                    response_limit=response_limit,
                    seed=seed,
                    enable_thinking=args.enable_thinking,
                    progress=True,
                )
