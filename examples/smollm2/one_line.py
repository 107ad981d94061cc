"""Runs a script of this example: whatever fails is one line and a status."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_opdlm.files.signals import stopped_by_signals


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and ends the process.

    The status is that of `main`, 2 after an error of input, network or disk, and 128 + n after
    signal n.
    """
    try:
        with stopped_by_signals():
            status = main()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        status = 2
    sys.exit(status or 0)
