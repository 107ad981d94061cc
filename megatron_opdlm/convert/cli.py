"""`opdlm convert`: import, export, verify, inspect."""

import argparse
import errno
import importlib
import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_opdlm.convert.formats import DEFAULT_FORMAT, FAMILY_FORMAT, FORMATS, format_names
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.signals import ended_by_interrupt, stopped_by_signals

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_TOLERANCE = 1e-3
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MASK_TOKEN = "<|MASK|>"  # tokenizer.MASK_TOKEN and mask_row.MASK_INITS, which import torch
MASK_INITS = ("keep", "mean")


def add_convert_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `convert` and its four subcommands. Each sets `args.run`, which returns a status."""
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
    untied = [name for name, item in FORMATS.items() if item.untied]
    moving = [
        f"{name}: move the mask token to the id that {item.engines} hard-code"
        for name, item in FORMATS.items()
        if item.engine_mask_id is not None
    ]
    parser = actions.add_parser("export", help="torch_dist checkpoint -> Hugging Face directory")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="checkpoint to export")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to create")
    parser.add_argument(
        "--format",
        choices=format_names(),
        default=DEFAULT_FORMAT,
        help=_describe_formats(),
    )
    parser.add_argument("--iteration", type=int, metavar="N", help="default: the latest")
    parser.add_argument(
        "--block-size", type=int, metavar="B", help="for a checkpoint that was not trained yet"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as stored")
    parser.add_argument(
        "--untie",
        action=argparse.BooleanOptionalAction,
        help="write the output layer of a tied model as a tensor of its own; default: for "
        f"{' and '.join(untied)}, where a reader needs it",
    )
    parser.add_argument(
        "--relocate-mask",
        action="store_true",
        help=f"{'; '.join(moving)}; unties",
    )
    parser.set_defaults(run=_reporting_os_errors(_export))


def _describe_formats() -> str:
    """Returns what every format is for, as argparse takes a help text."""
    lines = []
    for name, item in FORMATS.items():
        plain = ", or the checkpoint's own family" if name == FAMILY_FORMAT else ""
        lines.append(f"{name}{plain} ({', '.join(item.families)}): {item.summary}")
    return "; ".join((*lines, f"default: {DEFAULT_FORMAT}")).replace("%", "%%")


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
    """Reports an OSError (a full disk, a missing permission) like bad input: a user can fix it."""

    def run(args: argparse.Namespace) -> int:
        _require_text(args)
        with ended_by_interrupt():
            for name in ("numpy", "torch"):  # their C code loses exceptions of signal handlers
                importlib.import_module(name)
        try:
            with stopped_by_signals(writes=hasattr(args, "out")):
                return action(args)
        except OSError as error:
            path = error.filename
            if path is None or error.errno in _FULL:  # a copy names the file that it reads
                path = getattr(args, "out", path)
            where = "" if path is None else f"{path}: "
            raise ConversionError(f"{where}{error.strerror or error}") from error

    return run


def _require_text(args: argparse.Namespace) -> None:
    """Refuses names that are not UTF-8: JSON, model cards and libraries need UTF-8."""
    for name, value in vars(args).items():
        if value == "" and name != "mask_token":  # an empty path would be the current folder
            raise ConversionError(f"{name}: empty path")
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise ConversionError(f"{value!r} is not UTF-8 text; use another name") from None


# The actions import what they need when they run: `opdlm --help` must not load torch.


def _import(args: argparse.Namespace) -> int:
    from megatron_opdlm.checkpoint.layout import read_description, resolve_iteration
    from megatron_opdlm.convert.importer import import_hf

    for name in ("mask_token", "mask_init"):
        if args.no_mask and getattr(args, name) is not None:
            raise ConversionError(
                f"--no-mask adds no mask token; leave --{name.replace('_', '-')} away, or --no-mask"
            )
    import_hf(
        args.hf,
        args.out,
        add_mask=not args.no_mask,
        mask_token=MASK_TOKEN if args.mask_token is None else args.mask_token,
        mask_init=args.mask_init,
        chat_template=args.chat_template,
    )
    mask_token_id = read_description(resolve_iteration(args.out)).mask_token_id
    note = "" if args.no_mask else " (before it is trained, export needs --block-size)"
    summary = _summary(args.out, mask_token_id, checkpoint=args.out, hf=args.hf)
    sys.stdout.write(f"{summary}{note}\n")
    return 0


def _export(args: argparse.Namespace) -> int:
    from megatron_opdlm.checkpoint.layout import read_description, resolve_iteration
    from megatron_opdlm.convert.exporter import export
    from megatron_opdlm.files.folders import read_json_object

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
    folder = resolve_iteration(args.checkpoint, args.iteration)
    mask_token_id = read_json_object(Path(args.out) / "config.json").get(
        "mask_token_id", read_description(folder).mask_token_id
    )
    sys.stdout.write(_summary(args.out, mask_token_id, checkpoint=str(folder), hf=args.out) + "\n")
    return 0


def _summary(out: str, mask_token_id: int | None, *, checkpoint: str, hf: str) -> str:
    """Returns a line about the output, with the command that compares it with its source."""
    size = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
    mask = "no mask token" if mask_token_id is None else f"mask token {mask_token_id}"
    command = shlex.join(("opdlm", "convert", "verify", "--checkpoint", checkpoint, "--hf", hf))
    return f"{out}: {size / 1e9:.3f} GB, {mask}; next: {command}"


def _verify(args: argparse.Namespace) -> int:
    from megatron_opdlm.convert.verify import verify

    if not (args.tolerance >= 0 and math.isfinite(args.tolerance)):
        raise ConversionError(f"--tolerance {args.tolerance:g} must be a number of 0 or more")
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
