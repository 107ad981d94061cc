"""Finds out whether Triton's kernels can run, and logs choices of implementation once."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch


@functools.cache
def why_no_triton() -> str | None:
    """Returns why Triton cannot be used here, and the fix; None if it can be used.

    A broken installation, or one for another machine, fails in several ways. None of them may stop
    a run that the reference implementation can do.
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
    """Returns whether Triton interprets kernels; False if its version does not say."""
    return hasattr(triton, "knobs") and bool(triton.knobs.runtime.interpret)


@functools.cache
def log_once(logger: logging.Logger, level: int, line: str) -> None:
    """Logs a line only the first time in a process."""
    logger.log(level, "%s", line)
