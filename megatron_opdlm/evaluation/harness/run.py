"""`opdlm eval --harness TASKS`: lm-eval's tasks, decoded by the student."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.distributed import process_groups
from megatron_opdlm.evaluation.harness.arguments import check_harness, task_names
from megatron_opdlm.evaluation.harness.results import HarnessResult, table, write_folder
from megatron_opdlm.evaluation.harness.tasks import (
    HarnessTasks,
    load_tasks,
    repeatable,
    require_lm_eval,
)
from megatron_opdlm.evaluation.records import default_folder, require_new
from megatron_opdlm.evaluation.settings import chosen_rules
from megatron_opdlm.files.folders import replacing
from megatron_opdlm.generate.arguments import MAX_ROWS, decoding_options, open_decoder
from megatron_opdlm.generate.decoder import Decoder
from megatron_opdlm.rollout.request import DecodingOptions


def run_harness(args: argparse.Namespace) -> int:
    """Decodes, grades and reports. Call on all ranks with the same arguments.

    Args:
        args: arguments of `opdlm eval` and of `add_harness_arguments`.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: an argument is wrong, or a task cannot be done.
    """
    check_harness(args)
    if args.out is not None:
        require_new(Path(args.out))
    require_lm_eval()
    with repeatable():
        source = ModelSource.open(args.model)
        settings = [decoding_options(args, source, rule) for rule in chosen_rules(args)]
        names, include = task_names(args), args.harness_include or []
        tasks = load_tasks(names, include)
        decoder = open_decoder(args, max_rows=args.max_rows or MAX_ROWS)
        results = list(_results(args, decoder, tasks, settings))
    if decoder.parallel.is_main:
        about = {"model": args.model, "harness": names, "include": include}
        about |= {name: vars(args)[name] for name in ("num_fewshot", "num_questions", "gen_kwargs")}
        about |= {"chat_template": _renders(args), "fewshot_as_multiturn": _has_turns(args)}
        about |= {"system_instruction": args.system_instruction, "seed": _seed(args)}
        _report(args, about, results)
    # Only after success: this is a collective, and would wait for ranks that failed.
    process_groups.shutdown()
    return 0


def _results(
    args: argparse.Namespace,
    decoder: Decoder,
    tasks: HarnessTasks,
    settings: list[DecodingOptions],
) -> Iterator[HarnessResult]:
    from lm_eval import simple_evaluate

    from megatron_opdlm.evaluation.harness.model import DEFAULT_LIMIT, StudentLM

    for options in settings:
        model = StudentLM(
            decoder,
            options,
            default_limit=args.max_new_tokens or DEFAULT_LIMIT,
            seed=_seed(args),
            enable_thinking=args.enable_thinking,
        )
        start = time.perf_counter()
        figures = simple_evaluate(
            model=model,
            tasks=tasks.specs,
            task_manager=tasks.manager,
            num_fewshot=args.num_fewshot,
            limit=args.num_questions,
            gen_kwargs=args.gen_kwargs,
            system_instruction=args.system_instruction,
            apply_chat_template=_renders(args),
            fewshot_as_multiturn=_has_turns(args),
        )
        seconds = time.perf_counter() - start
        if figures is None:  # lm-eval gives figures to the first rank of every node
            figures = {"results": {}, "configs": {}, "samples": {}}
        yield HarnessResult(
            options=options, figures=figures, counts=dict(model.counts), seconds=seconds
        )


def _renders(args: argparse.Namespace) -> bool:
    return args.chat_template is not False


def _has_turns(args: argparse.Namespace) -> bool:
    return _renders(args) and args.fewshot_as_multiturn is not False


def _seed(args: argparse.Namespace) -> int:
    return args.seeds[0] if args.seeds else 0


def _report(args: argparse.Namespace, about: dict[str, Any], results: list[HarnessResult]) -> None:
    # Programs and logs read piped output, so it must not be wrapped.
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=200)
    folder = Path(args.out or default_folder())
    require_new(folder)
    folder.mkdir(parents=True, exist_ok=True)
    value = write_folder(folder, about, results)
    console.print(table(results))
    for line in [*_fewshot_notes(results[0], args.num_fewshot), *_notes(results)]:
        console.print(line)
    console.print(f"responses and figures: {folder}")
    if args.json is not None:
        with replacing(Path(args.json)) as partial:
            partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _fewshot_notes(result: HarnessResult, asked: int | None) -> Iterator[str]:
    """Yields a line for every task that has another number of examples than the user asked for."""
    for task, number in result.figures.get("n-shot", {}).items():
        if asked is not None and isinstance(number, int) and number != asked:
            yield f"{task}: num_fewshot={number}, which its file fixes, and not {asked}"


def _notes(results: list[HarnessResult]) -> Iterator[str]:
    """Yields a line for every task with responses that are counted apart."""
    for result in results:
        for task, counts in result.counts.items():
            if counts.too_long:
                yield (
                    f"{task}, {result.setting}: {counts.too_long} of {counts.responses} prompts "
                    "were too long to decode; their responses are empty"
                )
            if counts.tokens_cut:
                yield (
                    f"{task}, {result.setting}: {counts.tokens_cut} of {counts.tokens} decoded "
                    f"tokens stand after a stop string, in {counts.stopped} of {counts.responses} "
                    "responses; they are counted and not graded"
                )
