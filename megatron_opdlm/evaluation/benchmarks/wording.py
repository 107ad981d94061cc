"""The words in which questions are asked.

Instructions are those of the paper's appendix B.2. Where it has none, they are those of its
released evaluation (github.com/divelab/OPDLM, eval_utils.py), which takes them from the benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_opdlm.evaluation.benchmarks.benchmark import Asked

REASON = r"Please reason step by step, and put your final answer within \boxed{}."
CHOOSE = (
    'Please show your choice in the answer field with only the choice letter, e.g., "answer": "C".'
)
PROGRAM = (
    "Please provide a self-contained Python script that solves the following problem in a markdown "
    "code block:"
)
"""Instruction of EvalPlus for chat models (evalplus/evalplus, provider/utility.py)."""
CONTEST = (
    "This is the problem:\n{question}\nYou should put your code in ```python ```. Use input() to "
    "read input and print() to produce output in your script. "
)
"""Instruction for programs that read standard input (Gen-Verse/dLLM-RL, by way of the paper's
evaluation)."""
LETTERS = "ABCDEFGHIJKLMNOP"
"""Letters of options. MMLU-Pro has up to ten options; LETTERS is the limit of a question."""


def reasoned(question: str) -> str:
    """Returns a mathematics question with its instruction."""
    return f"{question}\n{REASON}"


def ask_choice(question: str, options: Sequence[str], place: int, **more: Any) -> Asked:
    """Makes a question of several options.

    Args:
        question: the question.
        options: at most 16 options.
        place: place of the correct option, from 0.
        more: other fields of `Asked`.
    """
    letters = LETTERS[: len(options)]
    lines = [f"{letter}. {option.strip()}" for letter, option in zip(letters, options, strict=True)]
    return Asked(
        text="\n".join([question.strip(), *lines, CHOOSE]),
        answer={"answer": letters[place]},
        **more,
    )


def program(problem: str) -> str:
    """Returns a programming problem with the instruction of EvalPlus.

    EvalPlus also begins the answer for the model; here the model writes all of it.
    """
    return f"{PROGRAM}\n```\n{problem.strip()}\n```\n"
