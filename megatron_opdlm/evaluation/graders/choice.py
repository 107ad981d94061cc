r"""Grades a response by the letter that it chooses.

A response gives its letter in an answer field ("answer": "C"), in a box, or after words such as
"the answer is", "correct option:" or "I choose"; also as "C is correct". The last of these counts.
If there is none of them, the last line does: it must be a letter, begin with one as in "C) Oslo",
or name exactly one as in "(C)" or "option C".

A letter counts only if it stands for itself: not in a word (Cold, C++, vitamin C), not the article
in "A good answer", not in a formula. Two different letters (A or C) are no choice, and "not C" is
none. Only letters are graded, never the text of an option.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque

from megatron_opdlm.evaluation.graders.final_answer import statements
from megatron_opdlm.evaluation.graders.grader import Grade, Grader
from megatron_opdlm.responses.entries import Entry

_CHOOSING = re.compile(
    r"(?:\b(?:options?|choice|letter)\b|\b(?:correct|right|best)\s+one\b|\u9009\u9879)"
    r"[^.\n:]{0,20}?(?:\bis\b|[:\uff1a]|\u662f|\u4e3a)"
    r"|\b(?:choose|pick|select|go\s+with|chosen)\b|\u9009\u62e9?(?!\u9879)",
    re.IGNORECASE,
)
_VERDICT = re.compile(
    r"(?P<before>\b(?:or|and|nor|of)\s+|[A-Z]\)?\s*[,/&]\s*)?(?:\b[Oo]ption\s+|\b[Cc]hoice\s+)?"
    r"(?<![^\W_])(?P<letter>\(?[A-Z]\)?)\**\s+is\s+(?:the\s+)?(?:most\s+)?"
    r"(?:correct|right|best|answer)\b"
    r"|(?P<joined>[A-Z]\s*[\u548c\u6216\u3001])?(?<![A-Za-z])(?P<only>[A-Z])\s*\u9879?\u662f?\u6b63\u786e"
)
_NOISE = re.compile(
    r"\\(?:text|mathrm|mathbf|mathsf|mbox|textit|textrm|textsf|textbf|bf|rm)(?![A-Za-z])|\\[ ,;:!]"
    r"|[*`\"\u2018\u201c\u201d\u3010\u3011$\\{}\[\]]|(?<![A-Za-z])['_]|['_](?!\w)"
)
_LEAD = re.compile(
    r"(?:\W|\b(?:the|is|be|options?|choices?|letters?|statement|alternative|la|le|el|die|correct|right|best|answer|clearly|therefore|so|"
    r"thus|hence|obviously|definitely|likely|most|probably|indeed|simply|just|final)\b)*",
    re.IGNORECASE,
)
_NOT_BUT = re.compile(r"\W*not\s+\(?[A-Z]\)?\s*,?\s*but\s+(?:rather\s+)?", re.IGNORECASE)
_NOT = re.compile(r"\W*not\b|\W*\u4e0d", re.IGNORECASE)
_CLAUSE = re.compile(r"[^.!?\n\u3002]*")
_NO_CHOICE = re.compile(
    r"\W*(?:neither|either|both|between|none|one\s+of|any\s+of|all\s+of)\b",
    re.IGNORECASE,
)
_LETTER = re.compile(
    r"(?P<letter>[A-Za-z])(?![A-Za-z0-9\u00c0-\u024f\u2019'^+#/&_=-]|\.[A-Za-z](?![a-z]))"
)
_SECOND = re.compile(
    r"[\s).:]*(?:[,;/&+\u3001]|\b(?:or|and|nor)\b|\u548c|\u6216|\u4e0e|\u53ca)"
    r"(?:[\s,(]|\b(?:or|and|rather|maybe|options?|choice)\b)*"
    r"(?P<letter>[A-Z])(?![A-Za-z0-9'])(?P<after>\s+[a-z])?"
)
_FORMULA = re.compile(r"\s*[+*/^=\u00d7]|\s+[<>]")
_ARTICLE = re.compile(r"\s+(?!(?:because|since|as|is|for|due|which|that|with)\b)[a-z]")
_END = re.compile(r"[\s.,;:!?)\u3002]*(?:\n|$)|\)")
_NAMED = re.compile(r"\((?P<bracketed>[A-Z])\)|\b(?:[Oo]ption|[Cc]hoice)\s+(?P<named>[A-Z])\b")
_AT_END = re.compile(r"(?:\b(?:is|be|with)|'s)\s+(?P<letter>[A-Z])\W*$")
_NEGATION = re.compile(
    r"\b(?:not|neither|none|wrong|incorrect|false|or)\b|n['\u2019]t\b|\u4e0d", re.IGNORECASE
)
_OPTION_LINE = re.compile(r"^[^\w\n]*(?:[Oo]ption\s+)?(?P<letter>[A-Z])[).:]\s*\S", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?\u3002](?=\s+[A-Z(])")
_MOST = 20
"""Most places of a kind that are looked at, from the last one back."""
_SENTENCE = 1000
"""Most characters of a statement or last line that are read."""


def grade_choice(response: str, answer: str) -> Grade:
    r"""Compares the letter that a response chooses with the reference.

    Args:
        response: text of the response.
        answer: reference; an upper-case letter.

    >>> grade_choice('{"answer": "C"}', "C").correct
    True
    >>> grade_choice("The answer is B or C.", "C").correct
    False
    """
    letter = chosen_letter(response)
    return Grade(correct=letter == answer, extracted=letter)


def chosen_letter(response: str) -> str | None:
    """Returns the upper-case letter that a response chooses; None if it chooses none."""
    found: list[tuple[int, str | None]] = []
    rest = 0
    for statement in statements(response):
        # What follows "the answer is" is looked at again, but not what follows "is not".
        negated = _NOT.match(statement.text) and _CLAUSE.match(response, statement.end)
        rest = max(rest, negated.end() if negated else statement.end)
        found.append((statement.end, letter_of(statement.text[:_SENTENCE])))
    for match in deque(_CHOOSING.finditer(response), _MOST):
        found.append((match.end(), letter_of(response[match.end() : match.end() + 100])))
    for match in deque(_VERDICT.finditer(response), _MOST):
        letter = (match["letter"] or match["only"]).strip("()")
        found.append((match.end(), "" if match["before"] or match["joined"] else letter))
    for _, letter in sorted(found, key=lambda each: each[0], reverse=True):
        if letter is not None:
            return letter or None
    return _letter_of_a_line(response[rest:]) or None


def letter_of(text: str) -> str | None:
    """Returns the letter that a statement chooses, "" for none, and None if it says nothing."""
    text = _NOT_BUT.sub("", _plain(text), count=1)
    lead = _LEAD.match(text)
    rest = text[lead.end() if lead else 0 :]
    if _NOT.match(rest):
        return None
    if _NO_CHOICE.match(rest):
        return ""
    match = _LETTER.match(rest)
    if match is None:
        return _named_letter(_SENTENCE_END.split(text.strip().partition("\n")[0])[0])
    return _judged(match["letter"], rest[match.end() :], bracketed=_is_bracketed(text, lead))


def _is_bracketed(text: str, lead: re.Match[str] | None) -> bool:
    return lead is not None and text[: lead.end()].endswith("(")


def _judged(letter: str, after: str, *, bracketed: bool) -> str:
    """Returns a letter in upper case, or "" if what stands after it makes it no choice."""
    second = _SECOND.match(after)
    if second is not None and second["letter"] != letter:
        is_word = second["letter"] in "AI" and second["after"] is not None
        if not is_word:
            return ""
    if _FORMULA.match(after) or (letter.islower() and not _END.match(after)):
        return ""
    if letter in "AI" and not bracketed and _ARTICLE.match(after):
        return ""
    return letter.upper()


def _named_letter(sentence: str) -> str | None:
    """Returns the one letter in brackets or after "option"; "" for several, None for no letter."""
    letters = {match["bracketed"] or match["named"] for match in _NAMED.finditer(sentence)}
    if not letters:
        return None
    return letters.pop() if len(letters) == 1 and not _NEGATION.search(sentence) else ""


def _letter_of_a_line(text: str) -> str:
    """Returns the letter of the last line, or of the first one if the last says nothing."""
    lines = [line for line in text.strip().split("\n") if line.strip()]
    if not lines:
        return ""
    options = {match["letter"] for match in _OPTION_LINE.finditer(text)}
    letter = _letter_of_line(lines[-1][-_SENTENCE:], are_listed=len(options) > 1)
    if letter or len(lines) == 1:
        return letter
    first = _plain(lines[0][:_SENTENCE])
    return _letter_at_start(first, are_listed=len(options) > 1) or ""


def _letter_of_line(line: str, *, are_listed: bool) -> str:
    plain = _plain(line)
    letter = _letter_at_start(plain, are_listed=are_listed and bool(_OPTION_LINE.match(line)))
    if letter is not None:
        return letter
    sentence = _SENTENCE_END.split(plain)[-1]
    at_end = _AT_END.search(sentence)
    if at_end is not None and not _NEGATION.search(sentence):
        return at_end["letter"]
    return _named_letter(sentence) or ""


def _letter_at_start(plain: str, *, are_listed: bool) -> str | None:
    """Returns the letter that a line begins with, "" if that is no choice, None for no letter.

    Args:
        plain: the line, without signs of LaTeX and Markdown.
        are_listed: whether the line belongs to a list of options.
    """
    lead = _LEAD.match(plain)
    rest = plain[lead.end() if lead else 0 :]
    match = _LETTER.match(rest)
    if match is None:
        return None
    after = rest[match.end() :]
    if match["letter"] in ("A", "I") and _ARTICLE.match(after):  # "I am sure that it is B"
        return None
    if are_listed or re.match(r"\s*[).:\]]|\W*$", after) is None:
        return ""
    return _judged(match["letter"], after, bracketed=_is_bracketed(plain, lead))


def _plain(text: str) -> str:
    """Returns a text without LaTeX's and Markdown's signs, and with plain Latin letters."""
    return _NOISE.sub(" ", unicodedata.normalize("NFKC", text))


def _read_reference(entry: Entry) -> str:
    answer = entry.written("answer")
    if answer is None or not re.fullmatch("[A-Za-z]", answer):
        raise entry.refusal("answer", "must be one letter", 'write e.g. "answer": "C"')
    return answer.upper()


CHOICE = Grader(
    name="choice",
    reads="`answer`, a letter",
    accepts='its letter is the answer; its letter is the one after the last `"answer":`, "answer '
    'is", "correct option is" or `\\boxed`, or that of its last line if it has none of these; two '
    "letters are no choice",
    read=_read_reference,
    grade=grade_choice,
)
