"""Grades short answers: does a response give one of the accepted answers at its beginning?"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

FIRST_WORDS = 16
"""Words of the first sentence that are read."""
_NEGATIONS = {"not", "never", "no", "cannot", "without", "neither", "nor", "isn't", "aren't"}
_NEGATED = 3
"""Words after a negation that it can concern: `not a very hot`."""
_NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
_TOKEN = re.compile(rf"(?<![\w)])-{_NUMBER}|{_NUMBER}(?![\w])|\w+(?:[-']\w+)*|[,;:=]")
_SENTENCE_END = re.compile(r"[.!?](?=[\s\"')*]|$)|\n")


def is_right(response: str, answers: Iterable[str]) -> bool:
    """Whether the first sentence of a response gives an accepted answer.

    Words count as a whole and without case: `Parisian` is not `Paris`, `112` is not `12`, `-4` is
    not `4`. `not hot` does not say `hot`. After `=` only what follows counts, so `4 + 5 = 10` does
    not say 4.

    Args:
        response: text.
        answers: accepted answers, each a word or several.
    """
    words = first_words(response)
    return any(gives(words, tokens(answer)) for answer in answers)


def first_words(response: str) -> list[str]:
    """The words of the first sentence, at most 16, and the marks between them."""
    text = response.strip()
    end = _SENTENCE_END.search(text)
    found = tokens(text[: end.start()] if end else text)
    places = [place for place, token in enumerate(found) if token not in ",;:="]
    if len(places) > FIRST_WORDS:
        found = found[: places[FIRST_WORDS]]
    if "=" in found:
        found = found[len(found) - found[::-1].index("=") :]
    return found


def tokens(text: str) -> list[str]:
    """Words, numbers and `, ; : =`, without case and accents; `minus 4` is -4."""
    text = unicodedata.normalize("NFKD", text).replace("\u2019", "'").replace("\u2212", "-")
    text = "".join(c for c in text if not unicodedata.combining(c)).casefold()
    text = re.sub(rf"\b(?:minus|negative) (?={_NUMBER})", _sign, text)
    found = _TOKEN.findall(text)
    return [token.replace(",", "") if token[-1].isdigit() else token for token in found]


def _sign(match: re.Match[str]) -> str:
    """A minus before a number that no number precedes; `10 minus 4` stays a subtraction."""
    before = match.string[: match.start()].rstrip()
    return " - " if before[-1:].isdigit() else "-"


def gives(words: list[str], answer: list[str]) -> bool:
    """Whether the words of an answer stand together, and no negation concerns them."""
    for start in range(len(words) - len(answer) + 1):
        if [plain(w) for w in words[start : start + len(answer)]] != answer:
            continue
        before = words[:start][-_NEGATED:]
        for mark in (",", ";", ":", "but"):  # a new clause
            if mark in before:
                before = before[len(before) - before[::-1].index(mark) :]
        if not any(word in _NEGATIONS or word.endswith("n't") for word in before):
            return True
    return False


def plain(word: str) -> str:
    """A word without the 's of a genitive."""
    return word.removesuffix("'s")
