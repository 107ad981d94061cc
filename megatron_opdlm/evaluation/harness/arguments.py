"""The arguments of `opdlm eval --harness`, and of lm-eval's model "opdlm"."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_opdlm.checks import require, require_at_least
from megatron_opdlm.evaluation.settings import add_setting_arguments, check_settings, chosen_rules
from megatron_opdlm.generate.arguments import (
    MAX_ROWS,
    add_model_arguments,
    check_arguments,
    decoding_options,
    open_decoder,
    require_folder,
)

if TYPE_CHECKING:
    from megatron_opdlm.generate.decoder import Decoder

_ONLY_HARNESS = (
    *("harness_include", "num_fewshot", "gen_kwargs", "system_instruction"),
    *("chat_template", "fewshot_as_multiturn"),
)
_NOT_HARNESS = {
    "task": "lm-eval's tasks have their own questions",
    "grader": "lm-eval's tasks have their own metrics",
    "responses": "lm-eval's tasks are decoded",
    "regrade": "lm-eval's tasks are decoded",
    "teacher": "lm-eval measures it with its own model hf",
    "examples": "samples.jsonl has all responses",
    "from_hub": "lm-eval gets the data of its tasks itself",
    "unsafe_code_execution": "tasks that run code are refused",
    "top_k": "lm-eval's tasks say how to sample; use --gen-kwargs top_k=K",
    "top_p": "lm-eval's tasks say how to sample; use --gen-kwargs top_p=P",
}
"""Arguments of `opdlm eval` that have no effect on tasks of lm-eval, with the reason."""


def add_harness_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `run_harness` reads, beside those of `opdlm eval`."""
    group = parser.add_argument_group(
        "tasks of lm-eval",
        "They bring their own questions, prompts and metrics. lm-eval gets their data from the "
        "Hugging Face hub, unless a YAML file names local files.",
    )
    group.add_argument(
        "--harness",
        metavar="TASKS",
        help="names of lm-eval's tasks, or their YAML files, separated by commas",
    )
    group.add_argument(
        "--harness-include",
        action="append",
        metavar="DIR",
        help="folder with YAML files of further tasks; may be given several times",
    )
    group.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="examples before each question; default: the task's",
    )
    group.add_argument(
        "--gen-kwargs",
        metavar="K=V,...",
        help="replaces what the tasks say of sampling and limits, e.g. "
        "max_gen_toks=512,do_sample=true,temperature=0.6",
    )
    group.add_argument("--system-instruction", metavar="TEXT", help="system message of all prompts")
    group.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help="render prompts with the model's chat template; default: yes (lm-eval's is no)",
    )
    group.add_argument(
        "--fewshot-as-multiturn",
        action=argparse.BooleanOptionalAction,
        help="make a turn of every example; default: yes, with the chat template",
    )


def require_no_harness_arguments(args: argparse.Namespace) -> None:
    """Refuses arguments that have an effect only with --harness.

    Raises:
        ValueError: the message names argument, value, rule and fix.
    """
    for name in _ONLY_HARNESS:
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        require(value is None, flag, value, "has an effect only with --harness", "leave it out")


def check_harness(args: argparse.Namespace) -> None:
    """Refuses, before any work, arguments that are out of range or have no effect.

    Raises:
        ValueError: the message names argument, value, rule and fix.
    """
    require(bool(task_names(args)), "--harness", args.harness, "must name a task", "e.g. gsm8k")
    fix = "name a run folder, a checkpoint or a Hugging Face directory"
    require(args.model is not None, "--model", None, "must be given", fix)
    for name, reason in _NOT_HARNESS.items():
        value = getattr(args, name, None)
        flag, rule = "--" + name.replace("_", "-"), f"has no effect with --harness: {reason}"
        require(not value, flag, value, rule, "leave it out")
    rule = "has no effect with --harness: lm-eval's tasks say how to sample"
    fix = "use --gen-kwargs do_sample=true,temperature=T"
    require(args.temperature == 0, "--temperature", args.temperature, rule, fix)
    require(len(args.seeds or [0]) == 1, "--seeds", args.seeds, "must be one seed", "run again")
    if args.fewshot_as_multiturn:
        rule = "needs the chat template"
        require(args.chat_template is not False, "--fewshot-as-multiturn", True, rule,
                "leave it out")  # fmt: skip
    for name in ("num_questions", "num_fewshot"):
        if (value := getattr(args, name)) is not None:
            require_at_least(1 if name == "num_questions" else 0, name, value)
    for seed in args.seeds or ():
        require_at_least(0, "--seeds", seed)
    # A seed has an effect where a task samples, whatever --temperature is.
    check_arguments(argparse.Namespace(**vars(args) | {"seeds": None}), "seeds")
    check_settings(args)
    if args.json is not None:
        require_folder(args.json, "--json")


def task_names(args: argparse.Namespace) -> list[str]:
    """Returns the names and files that --harness lists."""
    return [name.strip() for name in (args.harness or "").split(",") if name.strip()]


def open_model(
    given: Mapping[str, Any], unused: Mapping[str, Any]
) -> tuple[Decoder, dict[str, Any]]:
    """Loads the student that lm-eval's `model_args` describe.

    Args:
        given: arguments with the names of `opdlm eval`, such as model, block_size, dynamic and
            confidence_threshold; and seed.
        unused: lm-eval's own arguments batch_size, max_batch_size and device. The engine finds its
            batches and its device itself.

    Returns:
        The student, and the other arguments of `StudentLM`.

    Raises:
        ValueError: an argument is unknown or malformed, or there are several remasking rules.
    """
    from megatron_opdlm.convert.model_source import ModelSource

    require(not unused.get("device"), "device", unused.get("device"),
            "cannot be chosen: a GPU is used if there is one", "leave it out")  # fmt: skip
    args = _parse(given)
    args.rules = args.rules or ["low_confidence_static"]
    check_arguments(args, "seed")
    check_settings(args)
    rules = chosen_rules(args)
    require(len(rules) == 1, "model_args", ",".join(given), "must have one remasking rule with "
            "one value of each parameter", "run lm-eval once per rule")  # fmt: skip
    options = decoding_options(args, ModelSource.open(args.model), rules[0])
    decoder = open_decoder(args, max_rows=args.max_rows or MAX_ROWS)
    settings = {"options": options, "seed": args.seed or 0, "enable_thinking": args.enable_thinking}
    return decoder, settings | {"default_limit": args.max_new_tokens}


class _Parser(argparse.ArgumentParser):
    """A parser that raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"model_args: {message}")


def _parse(given: Mapping[str, Any]) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    add_model_arguments(parser)
    add_setting_arguments(parser)
    parser.add_argument("--seed", type=int, default=None)
    argv = []
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            argv.append(flag)
        elif value is not False:
            argv += [flag, str(value)]
        elif name == "cuda_graphs":  # the other flags are off by default
            argv.append("--no-cuda-graphs")
    return parser.parse_args(argv)
