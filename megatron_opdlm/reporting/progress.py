"""Progress bars of a job. Only its main rank draws them, and only in a terminal."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

logger = logging.getLogger(__name__)


def progress_bar(
    total: int, name: str, *, is_main: bool, initial: int = 0, leave: bool = True
) -> tqdm:
    """Returns a bar; `bar.update(done - bar.n)` shows how much is done.

    Args:
        total: number of things to do.
        name: name of these things.
        is_main: whether this rank draws.
        initial: number of things that are already done.
        leave: whether the bar stays visible when it is full.
    """
    hidden = None if is_main else True  # None: tqdm draws only in a terminal
    return tqdm(total=total, desc=name, initial=initial, leave=leave, disable=hidden)


def report_progress(text: str) -> None:
    """Logs the progress of a job if no bar is drawn, for its log file."""
    if not sys.stderr.isatty():
        logger.info("%s", text)
