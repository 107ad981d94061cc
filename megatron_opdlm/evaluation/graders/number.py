r"""Grades a response by its final number.

A response gives its answer as "The answer is 14.", "#### 14" or "\boxed{14}"; the last of these
counts (final_answer.py). If there is none of them, the last number of the response counts. What
stands there is graded by what it means (quantity.py), and never by a part of it:

- Of an equation, the last side that is a number counts: x = 14, or 3 + 11 = 14.
- Arithmetic means what it comes out at: 7 \cdot 2 is 14, \frac{28}{2} too. 14x, \sqrt{14}, 14^2,
  f(14), 14:30 and (14, 3) are not 14.
- Two different numbers are no answer: 14 or 15, 14 to 20, 14 apples and 3 pears. Bounds and
  negations neither: more than 14, not 14.
- Units, currencies and words around the number do not count. A percent sign or a word such as
  "million" may be the unit that the question asks for: 50% is 50 or 0.5, 3 million is 3000000 or 3.
- In a sentence with words before the number ("The answer is that Tom has 14 apples"), it must be
  the only number, or the last one behind an equals sign.

Numbers are compared as exact fractions: 1,200 equals 1200.0 and 1.2e3, and nothing is rounded.
"""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_opdlm.evaluation.graders.arithmetic import Token, clean, parse_decimal, tokens_of
from megatron_opdlm.evaluation.graders.final_answer import Statement, statements
from megatron_opdlm.evaluation.graders.grader import Grade, Grader
from megatron_opdlm.evaluation.graders.quantity import QuantityReader, Values
from megatron_opdlm.responses.entries import Entry

_REFERENCE = re.compile(
    r"(?P<sign>[-\u2212+]?)\s?\$?(?P<value>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?"
    r"|\.\d+(?:[eE][-+]?\d+)?)(?:\s?/\s?(?P<below>\d+))?\.?"
)
_FRACTION = re.compile(r"\\[dt]?frac\{\s*(-?\d+)\s*\}\{\s*(\d+)\s*\}")
_NO_NUMBER = re.compile(
    r"unknown|undefined|undetermined|impossible|infinit|\\infty|\bnone\b|no solution"
    r"|not exist|\bcannot\b|can't|\bnot\b", re.IGNORECASE
)  # fmt: skip
_SENTENCE_END = re.compile(r"[.!?\u3002](?=\s+[^\W\d_a-z]|\s*$)|\n")
_CRIES = re.compile(r"!+(?=[\s*\"')]|$)")
_BOLD = re.compile(r"\*\*([^*\n]{1,60})\*\*")
_CONCLUDING = {"so", "thus", "therefore", "hence", "then", "means", "but", "which", ";"}
_STEP = re.compile(
    r"\W*(?:step|part|case|section|question|problem|example|method|approach|stage|phase|option)"
    r"\s+\d+\W*", re.IGNORECASE
)  # fmt: skip
"""A heading in place of an answer, such as "#### Step 3"."""
_LINE = 2000
"""Most characters of a line that are read."""
_IN_CHAIN = set("+-*/^=\u2248(){}[]!%") | {r"\frac", r"\sqrt", "sqrt", "times", "plus", "minus"}


def final_number(text: str) -> Fraction | None:
    r"""Returns the number that a response gives as its answer; None if it gives none.

    Of 50%, this is 50.

    >>> final_number(r"12+5=17. 17-3=14. The answer is 14.")
    Fraction(14, 1)
    """
    values = _final_values(text)
    return values[0] if values else None


def parse_number(text: str) -> Fraction | None:
    """Returns the number that the whole text stands for; None if the text is not a number.

    >>> parse_number(" 1,200.50 "), parse_number("12 apples")
    (Fraction(2401, 2), None)
    """
    match = _REFERENCE.fullmatch(_FRACTION.sub(r"\1/\2", text).strip())
    value = None if match is None else parse_decimal(match["value"])
    below = None if match is None or match["below"] is None else parse_decimal(match["below"])
    if match is None or value is None or (match["below"] is not None and not below):
        return None
    value /= below or 1
    return value if match["sign"] in ("", "+") else -value


def grade_number(response: str, answer: str) -> Grade:
    """Compares the final number of a response with the reference answer.

    Args:
        response: text of the response.
        answer: reference answer; a text that stands for a number.
    """
    reference, values = parse_number(answer), _final_values(response)
    if reference is not None and reference in values:
        return Grade(correct=True, extracted=str(reference))
    return Grade(correct=False, extracted=str(values[0]) if values else None)


def _final_values(response: str) -> Values:
    """Returns what the final number of a response may mean; empty if it has none."""
    rest = 0
    for statement in statements(response):
        values = _read(statement)
        if values is not None:
            return values
        rest = max(rest, statement.end)
    # What precedes a statement without a number is working, not the answer.
    return _last_number(response[rest:])


def _read(statement: Statement) -> Values | None:
    """Returns what the number of a statement may mean; None if it states no answer at all."""
    if statement.announced_by == "box":
        return QuantityReader(tokens_of(clean(statement.text))).statement()
    text = _CRIES.sub(".", statement.text)
    reader = QuantityReader(tokens_of(clean(text)))
    values = reader.statement()
    if statement.announced_by == "hashes" and _STEP.fullmatch(text):
        return None
    if statement.announced_by == "hashes":
        after = reader.peek()
        is_heading = reader.skipped_words or (after is not None and after.text in ".:)")
        is_line = not is_heading or reader.peek(1) is None
        return values if is_line and reader.tokens else None
    if not any(token.kind == "number" for token in reader.tokens) and not values:
        return () if _NO_NUMBER.search(text) else None
    return _only_number(reader, text) if values and reader.skipped_words else values


def _only_number(reader: QuantityReader, text: str) -> Values | None:
    """Returns what the number of a sentence with other words means; None if it has several."""
    end = _SENTENCE_END.search(text)
    sentence = text[: end.start()] if end else text
    sides = re.split(r"=(?=[^=]*$)", sentence)
    last = QuantityReader(tokens_of(clean(sides[-1])))
    values = last.side()
    further = any(token.kind == "number" for token in last.tokens[last.place :])
    return None if further or not values else values


def _last_number(text: str) -> Values:
    """Returns what the last number of a text may mean, or the last one in bold of its line."""
    end = len(text)
    while end > 0:
        start = text.rfind("\n", 0, end) + 1
        if re.compile(r"\d").search(text, start, end):
            break
        end = start - 1
    else:
        return ()
    line = text[max(start, end - _LINE) : end]
    for bold in reversed(_BOLD.findall(line)):
        reader = QuantityReader(tokens_of(clean(bold)))
        values = reader.statement()
        if values and not reader.skipped_words:
            return values
    values = _result(line)
    if values:
        return values
    tokens = tokens_of(clean(_CRIES.sub(".", line)))
    for first in _chain_starts(tokens):
        if _stands_alone(tokens, first):
            return QuantityReader(tokens[first:]).statement()
    return ()


def _result(line: str) -> Values:
    """Returns the result of a line such as "It has 5 + 3 = 8 legs after 15 days"; else nothing."""
    sentences = [part for part in _SENTENCE_END.split(line) if re.search(r"\d", part)]
    sentence = sentences[-1] if sentences else ""
    reader = QuantityReader(tokens_of(clean(sentence.rpartition("=")[2])))
    values = reader.side() if "=" in sentence else ()
    concludes = any(token.text in _CONCLUDING for token in reader.tokens[reader.place :])
    numbers = sum(token.kind == "number" for token in reader.tokens)
    return values if numbers > 1 and not concludes else ()


def _chain_starts(tokens: list[Token]) -> list[int]:
    """Returns where the equation or arithmetic begins that holds the last number, and its side."""
    numbers = [place for place, token in enumerate(tokens) if token.kind == "number"]
    if not numbers:
        return []
    first = numbers[-1]
    while first > 0 and _is_in_chain(tokens, first - 1):
        first -= 1
    equals = [place for place in range(first, numbers[-1]) if tokens[place].text in "=\u2248"]
    return [_without_closing(tokens, place) for place in [first, *(p + 1 for p in equals[-1:])]]


def _without_closing(tokens: list[Token], first: int) -> int:
    """Skips signs that cannot begin an expression, and a dash."""
    while tokens[first].text in "=\u2248)}]%!" or (
        tokens[first].text == "-" and tokens[first].end < tokens[first + 1].start and first > 0
    ):
        first += 1
    return first


def _is_in_chain(tokens: list[Token], place: int) -> bool:
    """Whether a token may belong to the arithmetic behind it; "x" does between numbers."""
    token = tokens[place]
    is_times = token.text == "x" and place > 0 and tokens[place - 1].kind == "number"
    return token.kind == "number" or token.text in _IN_CHAIN or is_times


def _stands_alone(tokens: list[Token], first: int) -> bool:
    """Whether what stands before an expression does not make it a part of something."""
    if tokens[first].text in "+*/^x":
        return first == 0 and tokens[first].text == "+"
    if first == 0:
        return True
    number = tokens[first]
    if tokens[first - 1].text == "=" and first > 2 and tokens[first - 2].kind == "word":
        first -= 2  # of "x = 14 or x = 3", what stands before the second x
    before = tokens[first - 1]
    earlier = [token.kind == "number" for token in tokens[max(0, first - 3) : first - 1]]
    if before.kind == "command" or before.text in "_<>\u00b1\u2264\u2265\u2260|":
        return False
    if before.kind == "word":
        is_joiner = before.text.lower() in ("and", "or", "to") and any(earlier)
        is_variable = len(before.text) == 1 and before.text not in "aA"
        return not (is_joiner or is_variable or before.end == number.start) and (
            before.text.lower() not in _MAKING_A_PART
        )
    if before.text == ":":  # 2:14 and 3 : 14, but not "Step 3: 14"
        left = before.start - tokens[first - 2].end if first > 1 else 0
        return earlier[-1:] != [True] or left != number.start - before.end
    return not (before.text in ",;&" and earlier[-1:] == [True])


_MAKING_A_PART = {"not", "than", "sqrt", "log", "ln", "sin", "cos", "tan", "between", "from"}
"""Words right before the last number that make it a part, a bound, or what the answer is not."""


def _read_reference(entry: Entry) -> str:
    answer = entry.written("answer")
    if answer is None or parse_number(answer) is None:
        raise entry.refusal("answer", "must be a number", 'write e.g. "answer": "14"')
    return answer


NUMBER = Grader(
    name="number",
    reads="`answer`, a number",
    accepts="its number equals the answer exactly; its number is the one after the last "
    '"answer is", "answer:", "####" or `\\boxed`, or its last number if it has none of these',
    read=_read_reference,
    grade=grade_number,
)
