"""The files of questions that the paper's authors released, divelab/opdlm_eval_data on the hub.

What their entries hold is known from the code that reads them (github.com/divelab/OPDLM at 3bb8bf6,
eval_utils.py and reward/domain_reward.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from megatron_opdlm.evaluation.benchmarks.benchmark import Asked, Form, LeftOut
from megatron_opdlm.evaluation.benchmarks.fields import answer_text
from megatron_opdlm.evaluation.benchmarks.wording import CHOOSE, LETTERS, reasoned
from megatron_opdlm.responses.entries import Entry

_KEYS = ("question", "ground_truth_answer")
_IN_BRACKETS = re.compile(r"\(([A-J])\)\s*")


def mathematics_form(file: str) -> Form:
    """Returns the form of a file of mathematics questions, such as "GSM8K.json"."""

    def ask(entry: Entry) -> Asked:
        return Asked(
            text=reasoned(entry.text("question")),
            answer={"answer": answer_text(entry, "ground_truth_answer")},
            domain=entry.label("subdivision"),
        )

    return released_form(file, ask)


def choice_form(file: str, *, reformat: bool = False) -> Form:
    """Returns the form of a file of multiple-choice questions, whose options are in the question.

    Args:
        file: name of the file.
        reformat: whether the file writes "(A) yes", which is asked as "A. yes".
    """

    def ask(entry: Entry) -> Asked:
        question = entry.text("question")
        if reformat:
            question = _IN_BRACKETS.sub(r"\1. ", question)
        return _choice(entry, question)

    return released_form(file, ask)


def released_form(file: str, ask: Callable[[Entry], Asked | LeftOut]) -> Form:
    """Returns the form of a file of any questions. The file must have its name.

    All the files have the same two keys, and nothing in them says which benchmark they hold.
    """

    def ask_named(entry: Entry) -> Asked | LeftOut:
        assert entry.path is not None, "entries of published files know their file"
        if entry.path.name.removesuffix(".gz") != file:
            raise ValueError(
                f"{entry.where}: {entry.path.name} must be called {file}, because the files of "
                "divelab/opdlm_eval_data do not say what they hold; rename it if it is that file"
            )
        return ask(entry)

    return Form(name=f"divelab/opdlm_eval_data, {file}", keys=_KEYS, ask=ask_named)


def _choice(entry: Entry, question: str) -> Asked:
    found = set(re.findall(r"^\s*([A-P])\. ", question, re.MULTILINE))
    count = next((n for n, letter in enumerate(LETTERS) if letter not in found), len(LETTERS))
    letter = answer_text(entry, "ground_truth_answer").strip("() \n").upper()
    if count < 2:
        raise entry.refusal("question", "must have options A., B., ... in lines", "get the file")
    if len(letter) != 1 or letter not in LETTERS[:count]:
        rule = f"must be a letter from A to {LETTERS[count - 1]}"
        raise entry.refusal("ground_truth_answer", rule, "get the file")
    return Asked(
        text=f"{question}\n{CHOOSE}",
        answer={"answer": letter},
        domain=entry.label("subdivision"),
    )
