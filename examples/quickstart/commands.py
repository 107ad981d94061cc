"""What the scripts of this task share: its files, their commands, and the keys that they set."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_opdlm.checks import require

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "examples/configs/quickstart.yaml"
TEACHER = "examples/quickstart/teacher"
HELDOUT = "examples/quickstart/data/heldout.jsonl"
THRESHOLD = 0.9
"""Of dynamic decoding."""

BY_SCRIPT, LEAVE_OUT = "is set by the script", "leave it out"
OF_IMPORT = "belongs to the import, which the script does as it must be"
REFUSED = {
    "save": (BY_SCRIPT, "use --out DIR"),
    "student": (BY_SCRIPT, LEAVE_OUT),
    "teacher": ("is the imported model, and the measures compare with it", LEAVE_OUT),
    **dict.fromkeys(
        ("import_cache", "mask_token", "mask_init", "make_vocab_size_divisible_by"),
        (OF_IMPORT, LEAVE_OUT),
    ),
}
"""Keys that a script which imports, trains and measures does not take: the rule, and the fix."""


def require_allowed(keys: Sequence[str], refused: Mapping[str, tuple[str, str]]) -> None:
    """Refuses keys that a script sets, or with which a later step would fail or measure another.

    Args:
        keys: key=value of the user.
        refused: keys that the script does not take: the rule, and the fix.

    Raises:
        ValueError: the message names key, value, rule and fix.
    """
    for text in keys:
        key, _, value = text.partition("=")
        if key in refused:
            require(False, key, value, *refused[key])


def require_questions(number: int) -> None:
    """Refuses a number of questions that are not there.

    Raises:
        ValueError: the message names the option, its value, the rule and the fix.
    """
    from megatron_opdlm.evaluation.task import load_task

    load_task("heldout", str(ROOT / HELDOUT), number)


def opdlm(*arguments: str) -> list[str]:
    """The words of an `opdlm` command, with this interpreter."""
    return [sys.executable, "-m", "megatron_opdlm", *arguments]
