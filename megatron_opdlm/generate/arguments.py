"""The arguments that `opdlm generate` and `opdlm eval` share: the student, and how it decodes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_opdlm.checks import require, require_at_least
from megatron_opdlm.config.annotations import ParametersOf
from megatron_opdlm.config.schema import Key, parameter_keys, parse_text
from megatron_opdlm.diffusion.prediction import (
    PREDICTIONS,
    SAME_POSITION,
    require_trained_prediction,
)
from megatron_opdlm.diffusion.remasking import RULES, RemaskingRule

if TYPE_CHECKING:
    from megatron_opdlm.convert.model_source import ModelSource
    from megatron_opdlm.generate.decoder import Decoder
    from megatron_opdlm.rollout.request import DecodingOptions

MAX_ROWS = 256
DEFAULT_BLOCK_SIZE = 4
"""Block size of weights that were not yet trained for one."""

Parsers = argparse._SubParsersAction  # the type of argparse's `subparsers`


def add_model_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds the arguments that `generate` and `eval` share: the student, and how it decodes.

    Args:
        parser: parser of a command.
        required: whether the command cannot do without a model. If it can, the response limit is
            None by default.
    """
    parser.add_argument(
        "--model",
        required=required,
        metavar="DIR_OR_CKPT",
        help="run folder, checkpoint, or Hugging Face directory",
    )
    add_decoding_arguments(parser, limit=256 if required else None)
    parser.add_argument(
        "--enable-thinking", action="store_true", help="tell the chat template to ask for thoughts"
    )
    add_machine_arguments(parser)


def add_decoding_arguments(
    parser: argparse.ArgumentParser, *, limit: int | None, several: bool = False
) -> None:
    """Adds the arguments that say how a student decodes, without rules and thinking.

    Args:
        parser: parser of a command.
        limit: default of the response limit; None: the benchmark's.
        several: whether block size, temperature and response limit take lists of values.
    """
    lists: dict[str, Any] = {"nargs": "+"} if several else {}
    more = "; several values make several settings" if several else ""
    parser.add_argument(
        "--block-size",
        type=int,
        metavar="K",
        help=f"default: the student's block size in training{more}",
        **lists,
    )
    parser.add_argument(
        "--denoising-steps", type=int, metavar="N", help="most steps per block; default: K"
    )
    choices = "; ".join(f"{name}: {entry.summary}" for name, entry in PREDICTIONS.items())
    parser.add_argument(
        "--prediction",
        choices=PREDICTIONS,
        help="which output of the student predicts a masked position; default: as in the student's "
        f"training, {SAME_POSITION} before it. {choices}",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=[0.0] if several else 0.0,
        metavar="T",
        help=f"default: 0, greedy{more}",
        **lists,
    )
    _add_filter_arguments(parser)
    default = "the benchmark's, else 256" if limit is None else limit
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=limit,
        metavar="N",
        help=f"most tokens of a response; default: {default}{more}",
        **lists,
    )


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say how a student is loaded and held on this machine."""
    parser.add_argument(
        "--import-cache",
        metavar="DIR",
        help="folder in which a Hugging Face directory is converted, once for all commands that "
        "name the same DIR (training: import_cache); default: a temporary folder, removed when the "
        "model is loaded",
    )
    parser.add_argument(
        "--max-rows",
        type=int,
        metavar="N",
        help=f"most responses decoded at once on a data-parallel rank; default: {MAX_ROWS}",
    )
    parser.add_argument(
        "--kv-cache-gb",
        type=float,
        metavar="GB",
        help="most memory for keys and values on a rank, in GB of 10^9 bytes; default: 80%% of a "
        "GPU's free memory, 4.3 on a CPU",
    )
    parser.add_argument(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        help="capture decoding passes as CUDA graphs, one per size, because a host starts kernels "
        "more slowly than they run; default: if possible (CUDA, bfloat16, a decoding kernel)",
    )
    parser.add_argument(
        "--params-dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="default: bfloat16 on CUDA, else float32",
    )
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N")


def _add_filter_arguments(parser: argparse.ArgumentParser) -> None:
    # The default is None for arguments that have an effect only together with others.
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="with a temperature; default: 0, all tokens"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="with a temperature; default: 1, all"
    )


def add_parameter_arguments(parser: argparse._ActionsContainer, *, several: bool) -> None:
    """Adds an option for every parameter of a remasking rule; its value is None if it is not given.

    Args:
        parser: a parser, or a group of its arguments.
        several: whether an option takes a list of values.
    """
    more = "; several values make several settings" if several else ""
    for key in parameter_keys(ParametersOf(RULES), ()):
        parser.add_argument(
            f"--{key.name.replace('_', '-')}",
            type=_reader(key),
            nargs="+" if several else None,
            metavar="X",
            help=f"{key.doc.rstrip('.')}{more}; default: {key.default}".replace("%", "%%"),
        )


def _reader(key: Key) -> Callable[[str], Any]:
    """Returns a function that reads a parameter's text as the configuration does."""

    def read(text: str) -> Any:
        try:
            return parse_text(key.name, text, key.annotation)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def parameter_users() -> dict[str, list[str]]:
    """Returns, for every parameter of the remasking rules, the names of the rules that have it."""
    users: dict[str, list[str]] = {}
    for name, _, field in ParametersOf(RULES).fields():
        users.setdefault(field.name, []).append(name)
    return users


def check_arguments(args: argparse.Namespace, seeds: str) -> None:
    """Refuses arguments with which no student can be decoded. Reads no file.

    Args:
        args: the arguments of `add_model_arguments`, and `seeds`.
        seeds: name of the argument with the seed or seeds.

    Raises:
        ValueError: an argument is wrong; the message names argument, value, rule and fix.
    """
    for name in ("model", "import_cache"):
        given = getattr(args, name)
        require(given != "", name, "''", "must be a path", "name a folder, or leave it out")
    for name in ("max_new_tokens", "block_size", "denoising_steps", "max_rows"):
        if (value := getattr(args, name)) is not None:
            require_at_least(1, name, value)
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        require_at_least(1, name, getattr(args, name))
    if (limit := args.kv_cache_gb) is not None:
        is_usable, fix = 0 < limit < math.inf, "use a number above 0"
        require(is_usable, "kv_cache_gb", limit, "must be positive and finite", fix)
    given = getattr(args, seeds)
    for seed in given if isinstance(given, list) else [given]:
        if seed is not None:
            require_at_least(0, seeds, seed)
    for name in ("top_k", "top_p", seeds):
        given, here = getattr(args, name), "greedy decoding (temperature=0)"
        require_used(args.temperature != 0, name, given, "sampling", here)


def require_used(is_used: bool, name: str, given: Any, about: str, here: str) -> None:
    """Refuses a given argument that has no effect together with the others.

    Args:
        is_used: whether the argument has an effect.
        name: name of the argument.
        given: value of the argument; None if it was not given.
        about: use to which the argument applies.
        here: use that the other arguments ask for.

    Raises:
        ValueError: the argument has no effect; the message names argument, value, rule and fix.
    """
    value = " ".join(map(str, given)) if isinstance(given, list) else given
    rule = f"applies only to {about}, not to {here}"
    require(is_used or given is None, name, value, rule, "leave it out")


def decoding_options(
    args: argparse.Namespace, source: ModelSource, rule: RemaskingRule
) -> DecodingOptions:
    """Returns the decoding options of the arguments, with defaults of the student. Loads no model.

    Args:
        args: the arguments of `add_model_arguments`.
        source: source of the student. Block size and prediction are by default those of its
            training.
        rule: the remasking rule.

    Raises:
        ValueError: a value is out of its range, or the student was trained with another prediction.
    """
    from megatron_opdlm.rollout.request import DecodingOptions

    trained = source.block_size or DEFAULT_BLOCK_SIZE
    block_size = trained if args.block_size is None else args.block_size
    steps = block_size if args.denoising_steps is None else args.denoising_steps
    require_trained_prediction(args.prediction, source.prediction, source.path)
    prediction = args.prediction if source.prediction is None else source.prediction
    given = {name: getattr(args, name) for name in ("top_k", "top_p")}
    return DecodingOptions(
        block_size=block_size,
        denoising_steps=steps,
        prediction=SAME_POSITION if prediction is None else prediction,
        rule=rule,
        temperature=args.temperature,
        **{name: value for name, value in given.items() if value is not None},
    )


def prompt_room(
    positions: int, response_limit: int, block_size: int, *, key: str = "max_new_tokens"
) -> int:
    """Returns the most tokens that a prompt may have in a model of so many positions.

    Args:
        positions: number of positions of the model.
        response_limit: most response tokens.
        block_size: tokens per block.
        key: the user's name of `response_limit`, for messages.

    Raises:
        ValueError: there is no room for a prompt.
    """
    room = positions - response_limit - (block_size - 1)
    if room < 1:
        raise ValueError(
            f"{key}={response_limit} with block_size={block_size} leaves no "
            f"room for a prompt in the model's {positions} positions; use "
            f"{max(1, positions // 2)} or less"
        )
    return room


def open_decoder(args: argparse.Namespace, *, max_rows: int) -> Decoder:
    """Loads the student that the arguments name. Call on all ranks."""
    from megatron_opdlm.generate.decoder import Decoder

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


def require_folder(path: str, name: str) -> None:
    """Refuses, before any work, an output file whose folder does not exist."""
    if not path or Path(path).is_dir():
        raise ValueError(
            f"{name}={path!r} must be a file to write, not a folder; name a file in it"
        )
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{name}={path}: there is no folder {Path(path).parent}; make it first")
