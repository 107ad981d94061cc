"""`opdlm convert`: import, export, verify, inspect."""

import argparse
import json
import sys
from collections.abc import Callable

from megatron_opdlm.convert.errors import ConversionError

FORMATS = ("sdar",)
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_TOLERANCE = 1e-3
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
        "--no-mask", action="store_true", help="add no mask token (a teacher that is never trained)"
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
        help="the mask token's embedding: keep what the model has there, or the mean of the rows "
        "before it; default: keep a row that is there, mean for a new one",
    )
    parser.set_defaults(run=_reporting_os_errors(_import))


def _add_export(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser("export", help="torch_dist checkpoint -> Hugging Face directory")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="checkpoint to export")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to create")
    parser.add_argument("--format", choices=FORMATS, default="sdar", help="default: sdar")
    parser.add_argument("--iteration", type=int, metavar="N", help="default: the latest")
    parser.add_argument(
        "--block-size", type=int, metavar="B", help="for a checkpoint that was not trained yet"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as stored")
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
        try:
            return action(args)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise ConversionError(f"{where}{error.strerror or error}") from error

    return run


# The actions import what they need when they run: `opdlm --help` must not load torch.


def _import(args: argparse.Namespace) -> int:
    from megatron_opdlm.convert.importer import import_hf

    import_hf(
        args.hf,
        args.out,
        add_mask=not args.no_mask,
        mask_token=args.mask_token,
        mask_init=args.mask_init,
    )
    return 0


def _export(args: argparse.Namespace) -> int:
    from megatron_opdlm.convert.exporter import export_sdar

    export_sdar(
        args.checkpoint,
        args.out,
        iteration=args.iteration,
        block_size=args.block_size,
        dtype=args.dtype,
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
