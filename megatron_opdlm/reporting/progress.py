"""Progress bars of a job: drawn by its main rank, and only where someone can watch."""

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
        total: what there is to do.
        name: of the things that are counted.
        is_main: whether this rank draws.
        initial: how many are done already.
        leave: whether the bar stays when it is full.
    """
    hidden = None if is_main else True  # None: tqdm looks whether it writes to a terminal
    return tqdm(total=total, desc=name, initial=initial, leave=leave, disable=hidden)


def report_progress(text: str) -> None:
    """Logs how far a job is where no bar is drawn: in its log file."""
    if not sys.stderr.isatty():
        logger.info("%s", text)
