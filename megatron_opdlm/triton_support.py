"""Whether Triton's kernels can run, and how to say once which implementation does."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch


@functools.cache
def why_no_triton() -> str | None:
    """Says what is wrong with Triton here, with the remedy; None: it can be imported.

    A broken installation, or one for another machine, fails in several ways, and none of them may
    end a run that the reference can do.
    """
    try:
        triton = importlib.import_module("triton")
    except ModuleNotFoundError:
        return "Triton is not installed; install triton"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        text = " ".join(str(error).split())
        return f"Triton cannot be imported ({type(error).__name__}: {text}); reinstall triton"
    if torch.cuda.is_available() and _interprets(triton):
        return "Triton would interpret its kernels on the host; unset TRITON_INTERPRET"
    return None


def _interprets(triton: Any) -> bool:
    """Whether the environment has Triton interpret kernels; older ones do not say."""
    return hasattr(triton, "knobs") and bool(triton.knobs.runtime.interpret)


@functools.cache
def log_once(logger: logging.Logger, level: int, line: str) -> None:
    """Logs a line, the first time that a process has it to say."""
    logger.log(level, "%s", line)
