"""Graders. A new one is one file here and its name below."""

import difflib

from megatron_opdlm.checks import require
from megatron_opdlm.evaluation.graders.choice import CHOICE
from megatron_opdlm.evaluation.graders.code import CODE
from megatron_opdlm.evaluation.graders.contains import CONTAINS
from megatron_opdlm.evaluation.graders.exact import EXACT
from megatron_opdlm.evaluation.graders.grader import Grader
from megatron_opdlm.evaluation.graders.grid import GRID
from megatron_opdlm.evaluation.graders.gsm8k import GSM8K
from megatron_opdlm.evaluation.graders.ifeval import IFEVAL
from megatron_opdlm.evaluation.graders.livebench import LIVEBENCH
from megatron_opdlm.evaluation.graders.math import MATH
from megatron_opdlm.evaluation.graders.number import NUMBER

_ALL = (NUMBER, MATH, CHOICE, EXACT, CONTAINS, CODE, GRID, LIVEBENCH, GSM8K, IFEVAL)
GRADERS: dict[str, Grader] = {grader.name: grader for grader in _ALL}
DEFAULT_GRADER = NUMBER


def find_grader(name: str, where: str) -> Grader:
    """Returns the grader of a name.

    Args:
        name: name that the user gave.
        where: what asked for it, for messages, such as "of task cities".

    Raises:
        ValueError: there is no such grader; the message has the nearest name.
    """
    near = difflib.get_close_matches(name, GRADERS, n=1)
    fix = f"did you mean {near[0]}?" if near else "choose one of them, or none"
    require(name in GRADERS, "grader", name, f"{where} must be one of {', '.join(GRADERS)}", fix)
    return GRADERS[name]
