"""Grades a response by the instructions that it follows, with lm-eval's checkers of IFEval.

A response follows an instruction strictly if the checker says so of the response as it is, and
loosely if the checker says so of the response or of one of seven texts made of it: without its
first line, without its last line, without both, and each of these four without asterisks
(Zhou et al., 2023, "Instruction-Following Evaluation for Large Language Models").
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron_opdlm.evaluation.graders.grader import Grade, Grader
from megatron_opdlm.evaluation.graders.instructions import (
    Instruction,
    Instructions,
    read_instructions,
)

_SENTENCE_MODEL = "tokenizers/punkt_tab/english/"
"""Where NLTK's data has the model that finds the ends of sentences."""
_LETTER = "keywords:letter_frequency"


def grade_ifeval(response: str, instructions: Instructions) -> Grade:
    """Checks every instruction, strictly and loosely.

    Args:
        response: text of the response. An empty one follows no instruction.
        instructions: what it must follow.

    Returns:
        A grade that is correct if the response follows all instructions strictly, and whose
        verdicts have lm-eval's names.
    """
    loosened = list(_loosened(response))
    strict, loose = [], []
    for instruction in instructions.items:
        follows = _checker(instruction)
        strict.append(follows(response))
        loose.append(strict[-1] or any(map(follows, loosened)))
    return Grade(
        correct=all(strict),
        verdicts={
            "prompt_level_strict_acc": (all(strict),),
            "inst_level_strict_acc": tuple(strict),
            "prompt_level_loose_acc": (all(loose),),
            "inst_level_loose_acc": tuple(loose),
        },
    )


def count_verdicts(instructions: Instructions) -> dict[str, int]:
    """Returns the number of verdicts of each name that a grade has."""
    count = len(instructions.items)
    return {
        "prompt_level_strict_acc": 1,
        "inst_level_strict_acc": count,
        "prompt_level_loose_acc": 1,
        "inst_level_loose_acc": count,
    }


def require_ifeval() -> None:
    """Imports the checkers. Nothing is downloaded.

    Raises:
        ImportError: lm-eval or a library of its checkers is not installed.
        FileNotFoundError: NLTK's model of sentences is not on this machine.
    """
    _checkers()


@functools.cache
def _checkers() -> Mapping[str, Any]:
    """Returns lm-eval's checkers by name of instruction."""
    try:
        import langdetect
        import nltk

        _require_sentence_model(nltk)  # otherwise the next import would download it
        from lm_eval.tasks.ifeval import instructions, instructions_registry
    except ImportError as error:
        raise ImportError(
            f"grader=ifeval needs {error.name}, which is not installed; install it with: "
            "pip install 'megatron-opdlm[eval]'"
        ) from None
    langdetect.DetectorFactory.seed = 0  # it draws samples: without a seed, verdicts change
    # It logs every response whose language it cannot tell, and counts it as followed.
    logging.getLogger(instructions.__name__).setLevel(logging.CRITICAL)
    found: dict[str, Any] = instructions_registry.INSTRUCTION_DICT
    return found


def _require_sentence_model(nltk: Any) -> None:
    try:
        nltk.data.find(_SENTENCE_MODEL)
    except LookupError:
        raise FileNotFoundError(
            f"grader=ifeval needs NLTK's data {_SENTENCE_MODEL.strip('/')}, which is not on this "
            "machine; get it with: python -m nltk.downloader punkt_tab, or from the package index "
            "with: python tools/get_punkt.py, or set NLTK_DATA=DIR to the folder that has it"
        ) from None


def _checker(instruction: Instruction) -> Callable[[str], bool]:
    """Returns the function that says whether a text follows an instruction."""
    parameters = instruction.parameters
    if instruction.id == _LETTER and not _is_letter(parameters["letter"]):
        return functools.partial(_has_character, **parameters)
    checker = _checkers()[instruction.id](instruction.id)
    checker.build_description(**parameters)
    return lambda text: bool(text.strip()) and bool(checker.check_following(text))


def _is_letter(character: str) -> bool:
    return character.isascii() and character.isalpha()


def _has_character(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """Counts a character that is no letter.

    lm-eval's checker draws a letter at random instead; IFEval has two prompts that ask for "!" and
    for "#".
    """
    count = text.count(letter)
    is_enough = count >= let_frequency
    return bool(text.strip()) and (is_enough if let_relation == "at least" else not is_enough)


def _loosened(response: str) -> Iterator[str]:
    """Yields the response without the decoration that models add; see the top of this file."""
    lines = response.split("\n")
    parts = [response]
    parts += ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    for part in parts:
        yield part
        yield part.replace("*", "")


IFEVAL = Grader(
    name="ifeval",
    reads="`instruction_id_list`, names of IFEval's instructions, and `kwargs`, the parameters of "
    "each",
    accepts="it follows all instructions, strictly; the shares of prompts and of instructions that "
    "are followed, strictly and loosely, are further figures",
    read=read_instructions,
    grade=grade_ifeval,
    require=require_ifeval,
    count_verdicts=count_verdicts,
    runs_in="processes",  # a pattern can take hours on a text of a million spaces
    seconds=30.0,
)
