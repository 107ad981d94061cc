"""`opdlm convert`: import, export, verify, inspect."""

import argparse
import contextlib
import errno
import json
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from megatron_opdlm.convert.errors import ConversionError

FORMATS = ("sdar", "a2d", "base", "qwen3", "qwen2", "llama")
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_TOLERANCE = 1e-3
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MASK_TOKEN = "<|MASK|>"  # tokenizer.MASK_TOKEN and mask_row.MASK_INITS, which import torch
MASK_INITS = ("keep", "mean")


def add_convert_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `convert` and its four subcommands; each sets `run(args) -> exit code`."""
    convert = subparsers.add_parser("convert", help="Hugging Face checkpoints in and out")
    actions = convert.add_subparsers(metavar="ACTION", required=True)
    _add_import(actions)
    _add_export(actions)
    _add_verify(actions)
    _add_inspect(actions)


def _add_import(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser("import", help="Hugging Face directory -> torch_dist checkpoint")
    parser.add_argument("--hf", required=True, metavar="DIR", help="model to import")
    parser.add_argument("--out", required=True, metavar="DIR", help="checkpoint to create")
    parser.add_argument(
        "--no-mask",
        action="store_true",
        help="add no mask token (not for the teacher of a student whose vocabulary grew by it)",
    )
    parser.add_argument(
        "--mask-token",
        metavar="TEXT",
        default=MASK_TOKEN,
        help="text of the mask token; one that the tokenizer has keeps its id, another gets the "
        f"first free row of the embedding, or a new one; default: {MASK_TOKEN}",
    )
    parser.add_argument(
        "--mask-init",
        choices=MASK_INITS,
        help="the mask token's embedding: keep what the model has there, or the mean of all "
        "other rows; default: keep a row that is there, mean for a new one",
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja template for prompts, where the tokenizer has none (base models), or in its "
        "place; it travels with checkpoint and export; default: the tokenizer's",
    )
    parser.set_defaults(run=_reporting_os_errors(_import))


def _add_export(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser("export", help="torch_dist checkpoint -> Hugging Face directory")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="checkpoint to export")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to create")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="sdar",
        help="sdar: transformers, LMDeploy, SGLang, JetEngine (Qwen3 only); a2d: the dLLM toolkit "
        "and the OPDLM evaluation; base, or the name of the checkpoint's own family: plain "
        "weights; default: sdar",
    )
    parser.add_argument("--iteration", type=int, metavar="N", help="default: the latest")
    parser.add_argument(
        "--block-size", type=int, metavar="B", help="for a checkpoint that was not trained yet"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as stored")
    parser.add_argument(
        "--untie",
        action=argparse.BooleanOptionalAction,
        help="write the output layer of a tied model as a tensor of its own; default: for sdar, "
        "which SGLang cannot load tied",
    )
    parser.add_argument(
        "--relocate-mask",
        action="store_true",
        help="sdar: move the mask token to the id that LMDeploy and SGLang hard-code; unties",
    )
    parser.set_defaults(run=_reporting_os_errors(_export))


def _add_verify(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser("verify", help="compare logits with a Hugging Face directory")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="checkpoint to check")
    parser.add_argument("--hf", required=True, metavar="DIR", help="directory to compare with")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=DEFAULT_TOLERANCE,
        help=f"largest difference of a logit, in float32; default: {DEFAULT_TOLERANCE}",
    )
    parser.set_defaults(run=_reporting_os_errors(_verify))


def _add_inspect(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser("inspect", help="say what a path is")
    parser.add_argument("path", metavar="PATH", help="checkpoint or Hugging Face directory")
    parser.add_argument("--json", action="store_true", help="machine-readable, with all tensors")
    parser.set_defaults(run=_reporting_os_errors(_inspect))


def _reporting_os_errors(
    action: Callable[[argparse.Namespace], int],
) -> Callable[[argparse.Namespace], int]:
    """A full disk or a missing permission is the user's to fix, like any other bad input."""

    def run(args: argparse.Namespace) -> int:
        _require_text(args)
        try:
            with _stopped_by_signals(writes=hasattr(args, "out")):
                return action(args)
        except OSError as error:
            path = error.filename
            if path is None or error.errno in _FULL:  # a copy names the file that it reads
                path = getattr(args, "out", path)
            where = "" if path is None else f"{path}: "
            raise ConversionError(f"{where}{error.strerror or error}") from error

    return run


def _require_text(args: argparse.Namespace) -> None:
    """Names go into JSON, into a model card and to libraries that know UTF-8 alone."""
    for value in vars(args).values():
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise ConversionError(f"{value!r} is not UTF-8 text; use another name") from None


@contextlib.contextmanager
def _stopped_by_signals(*, writes: bool) -> Iterator[None]:
    """What batch systems and closed terminals send clears up as Ctrl-C does.

    They allow 30 seconds or more before they kill; deleting an unfinished output takes less.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each in before:  # a second Ctrl-C must not stop the clearing up
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in _STOPPING}
    before = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}  # nohup
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            name = signal.Signals(received[0]).name
            left = "; nothing half-written is left" if writes else ""
            sys.stderr.write(f"\nerror: stopped by {name}{left}\n")


# The actions import what they need when they run: `opdlm --help` must not load torch.


def _import(args: argparse.Namespace) -> int:
    from megatron_opdlm.convert.importer import import_hf

    import_hf(
        args.hf,
        args.out,
        add_mask=not args.no_mask,
        mask_token=args.mask_token,
        mask_init=args.mask_init,
        chat_template=args.chat_template,
    )
    return 0


def _export(args: argparse.Namespace) -> int:
    from megatron_opdlm.convert.exporter import export

    export(
        args.checkpoint,
        args.out,
        format=args.format,
        iteration=args.iteration,
        block_size=args.block_size,
        dtype=args.dtype,
        untie=args.untie,
        relocate_mask=args.relocate_mask,
    )
    return 0


def _verify(args: argparse.Namespace) -> int:
    from megatron_opdlm.convert.verify import verify

    result = verify(args.checkpoint, args.hf)
    passes = result.passes(args.tolerance)
    sys.stdout.write(
        f"max |delta| of logits, float32\n"
        f"  causal mask                          {result.causal:.3e}\n"
        f"  block-causal mask, block size {result.block_size:<6} {result.block_causal:.3e}\n"
        f"  control with wrong qkv order, causal {result.control:.3e}\n"
        f"{'PASS' if passes else 'FAIL'} at tolerance {args.tolerance:g}\n"
    )
    return 0 if passes else 1


def _inspect(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from megatron_opdlm.convert.inspect import inspect

    result = inspect(args.path)
    text = json.dumps(asdict(result), indent=2) if args.json else result.to_text()
    sys.stdout.write(text + "\n")
    return 0
