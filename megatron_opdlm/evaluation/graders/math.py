r"""Grades a response by its final mathematical expression, with the library math-verify.

The answer is what the last \boxed holds; else what stands after the last "the answer is"; else the
last formula, or what math-verify finds at the end of the response. It is compared like this:

- Numbers are compared exactly, as by the grader `number`: 3/4 is 0.75, but 1/3 is not 0.33, and \pi
  is not 3.14. Units, currencies and degrees do not count; 10% is 10 or 0.1.
- Tuples, intervals and unions are compared part by part; of sets and lists the order does not
  count, and \pm stands for two numbers. (3, 4) is not (4, 3), [3, 4] is not (3, 4), and one of two
  solutions is not both.
- Words are compared as words: \text{Evelyn} is Evelyn. Letters of choices count with or without
  brackets. A number in base 8 needs the right digits, and the right base if it has one.
- Everything else (roots, letters, equations, matrices) is compared by math-verify, which
  simplifies the difference with SymPy.

It runs in worker processes with a time limit: simplifying can take for ever.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from megatron_opdlm.evaluation.graders.arithmetic import Reader, clean, tokens_of
from megatron_opdlm.evaluation.graders.choice import letter_of
from megatron_opdlm.evaluation.graders.final_answer import Statement, statements
from megatron_opdlm.evaluation.graders.grader import Grade, Grader
from megatron_opdlm.evaluation.graders.latex import (
    as_intervals,
    canonical,
    take_apart,
    without_name,
    words_of,
)
from megatron_opdlm.evaluation.graders.number_words import read_number_words
from megatron_opdlm.evaluation.graders.quantity import QuantityReader, Values
from megatron_opdlm.responses.entries import Entry

_LONGEST = 1000
"""Most characters of an answer. What is longer is wrong."""
_TAIL = 2000
"""Characters at the end of a response in which an answer is looked for if nothing announces it."""
_ALONE = 200
"""Most characters of a response that is nothing but an expression."""
_DIGITS = 12
"""Decimals that must agree if one of two expressions holds a decimal number."""
_SECONDS = 15.0

_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\$])\$([^$\n]+)\$(?!\$)", re.DOTALL
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$|\*)|,? (?:because|since|so|which|not|as) |\n")
_BASE = re.compile(r"\(?([0-9A-Za-z]+)\)?\s*_\s*(?:\{\s*(?:\\text\{)?\s*(\w+)\s*\}?\s*\}|(\w))")
_CHOICE = re.compile(r"(?:\\text(?:bf)?\s*\{)?\(?([A-J])\)?\}?")
_PRIME = re.compile(r"(?<=[A-Za-z)}'])'|\\prime")
_LETTER = re.compile(r"\\(?:text|mathrm|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+|(?P<one>[A-Za-z])")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|in)(?![A-Za-z])")


def grade_math(response: str, answer: str) -> Grade:
    r"""Compares the final expression of a response with the reference answer.

    Args:
        response: text of the response.
        answer: reference answer, in LaTeX.
    """
    said = _final_expression(response)
    if said is None:
        return _grade_unannounced(response[-_TAIL:], answer)
    if len(said) > _LONGEST:
        return Grade(correct=False, extracted=said[:100])
    return Grade(correct=_equal(canonical(answer), canonical(said)), extracted=said.strip() or None)


def _final_expression(response: str) -> str | None:
    """Returns what a response announces as its answer; None if it announces nothing."""
    found = list(statements(response))
    boxes = [each for each in found if each.announced_by == "box"]
    if boxes:
        return boxes[0].text
    said = [_expression_of(each) for each in found]
    # "The answer is 42. I hope the answer is clear." answers in its first sentence.
    telling = [text for text in said if re.search(r"[\d\\A-Z]", text)]
    if telling or said:
        return (telling or said)[0]
    formulas = [next(filter(None, match)) for match in _FORMULA.findall(response[-_TAIL:])]
    if formulas:
        return formulas[-1]
    alone = response.strip()
    return alone if len(alone) <= _ALONE and "\n" not in alone and " " not in alone else None


def _expression_of(statement: Statement) -> str:
    """Returns the formulas at the beginning of a sentence, or the sentence."""
    sentence = _SENTENCE_END.split(statement.text, maxsplit=1)[0]
    formulas = list(_FORMULA.finditer(sentence))
    if not formulas:
        return re.sub(r"\*\*|^\\[(\[]|\\[)\]]\s*$|^\$+", "", sentence).strip(" *_`")
    joined = [formulas[0]]
    for before, formula in zip(formulas, formulas[1:], strict=False):
        between = sentence[before.end() : formula.start()]
        if not re.fullmatch(r"\s*(?:,|,?\s*and|,?\s*or)\s*", between):
            break
        joined.append(formula)
    return ", ".join(next(filter(None, match.groups())) for match in joined)


def _grade_unannounced(end: str, answer: str) -> Grade:
    """Grades by what math-verify extracts from the end of a response."""
    parse, verify = _library()
    found = parse(end, parsing_timeout=None, fallback_mode="no_fallback")
    if not found:
        return Grade(correct=False)
    gold = _parsed(canonical(answer))
    correct = bool(gold) and verify(gold, found, float_rounding=_DIGITS, timeout_seconds=None)
    return Grade(correct=correct, extracted=str(found[0])[:100])


def _equal(reference: str, said: str) -> bool:
    """Whether two answers in canonical spelling mean the same."""
    if not said:
        return False
    if reference.replace(" ", "") == said.replace(" ", ""):
        return True
    words = words_of(reference)
    is_text = "\\text" in reference or "\\m" in reference
    if words is not None and (is_text or len(words) > 2 or "\\text" in said):
        if words == words_of(said):
            return True
        if is_text:
            return False
    choice = _CHOICE.fullmatch(reference)
    if choice is not None and letter_of(said) is not None:
        return letter_of(said) == choice[1]
    if _in_base(reference) or _in_base(said):
        return _equal_in_base(reference, said)
    return _equal_parts(reference, said)


def _equal_in_base(reference: str, said: str) -> bool:
    """Compares numbers such as 2516_8; one without base has the base of the question."""
    first, second = _in_base(reference), _in_base(said)
    if first is None:
        return _scalar_equal(reference, said)
    return first == second if second is not None else first[0] == said.replace(" ", "")


def _in_base(text: str) -> tuple[str, int] | None:
    """Returns the digits and the base of a number such as 2516_8; None if it is none, as x_1."""
    match = _BASE.fullmatch(text)
    if match is None:
        return None
    base = match[2] or match[3]
    words = read_number_words([base.lower()])
    number = int(base) if base.isdecimal() else 0 if words is None else words[0]
    if not 2 <= number <= 36:
        return None
    try:
        int(match[1], number)
    except ValueError:
        return None
    return match[1], number


def _equal_parts(reference: str, said: str) -> bool:
    mine, theirs = take_apart(reference), take_apart(said)
    if mine.kind != theirs.kind:
        mine, theirs = as_intervals(mine), as_intervals(theirs)
    if mine.kind == theirs.kind == "":
        return _scalar_equal(mine.items[0], theirs.items[0])
    if mine.kind in ("set", "list"):
        if theirs.kind not in ("set", "list"):
            return len(mine.items) == 1 and _equal_parts(mine.items[0], said)
        return _equal_in_any_order(_values(mine.items), _values(theirs.items))
    if mine.kind == theirs.kind == "union":
        return _equal_in_any_order(mine.items, theirs.items)
    if mine.kind == "()" and theirs.kind == "list":
        return _equal_in_order(mine.items, theirs.items)
    if theirs.kind == "set" and len(theirs.items) == 1:
        return _equal_parts(reference, theirs.items[0])
    return mine.kind == theirs.kind and _equal_in_order(mine.items, theirs.items)


def _values(items: list[str]) -> list[str]:
    return [without_name(item)[1] for item in items]


def _equal_in_order(first: list[str], second: list[str]) -> bool:
    return len(first) == len(second) and all(map(_equal_parts, first, second))


def _equal_in_any_order(first: list[str], second: list[str]) -> bool:
    if len(first) != len(second):
        return False
    left = list(second)
    for item in first:
        match = next((other for other in left if _equal_parts(item, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _scalar_equal(reference: str, said: str) -> bool:
    """Compares two expressions or equations."""
    name, value = without_name(reference)
    said_name, said_value = without_name(said)
    if name and said_name and name.lower() != said_name.lower():
        return _verified(reference, said)
    if name and "=" not in said:
        reference = value
    if "=" not in reference and "=" in said and not _RELATION.search(said):
        last, first = said.rpartition("=")[2].strip(), said.partition("=")[0].strip()
        is_turned = re.fullmatch("[A-Za-z]", last) and not said_name  # 14 = x
        said = first if is_turned else last
    elif name and said_name:
        reference, said = value, said_value
    numbers = _number(reference)
    if numbers:
        said_numbers = QuantityReader(tokens_of(clean(said))).statement()
        if said_numbers:
            return bool(set(numbers) & set(said_numbers))
    # math-verify does not see primes.
    return _PRIME.findall(reference) == _PRIME.findall(said) and _verified(reference, said)


def _number(text: str) -> Values:
    """Returns what a number means that is the whole text; empty if it is none."""
    reader = Reader(tokens_of(clean(text)))
    value = reader.expression()
    if value is None:
        return ()
    if reader.at("%") and reader.peek(1) is None:
        return (value, value / Fraction(100))
    return (value,) if reader.peek() is None else ()


def _verified(reference: str, said: str) -> bool:
    """Whether math-verify finds two expressions equal."""
    _, verify = _library()
    gold, found = map(_parsed, _with_cases_apart(reference, said))
    return bool(gold and found) and verify(
        gold,
        found,
        float_rounding=_DIGITS,
        allow_set_relation_comp=True,
        timeout_seconds=None,
        raise_on_error=True,
    )


def _with_cases_apart(*texts: str) -> list[str]:
    r"""Returns formulas with other letters for the capital ones that stand there small, too.

    math-verify takes R for r, and so R^2 - r^2 for 0.

    >>> _with_cases_apart("R^2 - r^2", r"\Re(R)")
    ['a^2 - r^2', '\\Re(a)']
    """
    letters = {match["one"] for text in texts for match in _LETTER.finditer(text)} - {None}
    both = sorted(letter for letter in letters if letter.isupper() and letter.lower() in letters)
    small = {letter.lower() for letter in letters}
    free = [letter for letter in "abcfghjklmnopqrstuvwxyz" if letter not in small]
    other = dict(zip(both, free, strict=False))
    return [
        _LETTER.sub(lambda match: other.get(match["one"] or "", match[0]), text) for text in texts
    ]


@lru_cache(maxsize=4096)
def _parsed(text: str) -> list[Any]:
    """Returns the expressions that math-verify reads in a formula; the letter i is imaginary."""
    from math_verify import LatexExtractionConfig
    from sympy import Basic, I

    parse, _ = _library()
    config = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    found = parse(
        rf"\boxed{{{text}}}", [config], fallback_mode="no_fallback", parsing_timeout=None
    )  # the pool bounds the time: signals would only reach a main thread
    return [
        each.subs({s: I for s in each.free_symbols if s.name == "i"})
        if isinstance(each, Basic)
        else each
        for each in found
    ]


@lru_cache(maxsize=1)
def _library() -> tuple[Any, Any]:
    """Returns math-verify's functions `parse` and `verify`.

    Raises:
        ImportError: math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ImportError(
            "the grader math needs math-verify; pip install 'megatron-opdlm[eval]'"
        ) from None
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it bounds no time
    return parse, verify


def _require() -> None:
    _library()


def _read(entry: Entry) -> str:
    answer = entry.written("answer")
    fix = r'write e.g. "answer": "\\frac{1}{2}"'
    if answer is None or not canonical(answer):
        raise entry.refusal("answer", "must be a number or LaTeX, and not empty", fix)
    plain = re.sub(r"\\.", "", answer)
    if len(answer) > _LONGEST or plain.count("{") != plain.count("}"):
        rule = f"must be LaTeX of at most {_LONGEST} characters that closes every brace"
        raise entry.refusal("answer", rule, fix)
    return answer


MATH = Grader(
    name="math",
    reads="`answer`, a number or LaTeX",
    accepts="its expression equals the answer; its expression is what the last `\\boxed` holds, or "
    'stands after the last "answer is", or is its last formula; needs math-verify',
    read=_read,
    grade=grade_math,
    require=_require,
    runs_in="processes",
    seconds=_SECONDS,
)
