"""Numbers in words: "fourteen", "twenty-one", "two hundred and five"."""

from __future__ import annotations

from collections.abc import Sequence

_SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_VALUES = {word: value for value, word in enumerate(_SMALL)} | {
    word: 10 * tens for tens, word in enumerate(_TENS, 2)
}
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}


def read_number_words(words: Sequence[str]) -> tuple[int, int] | None:
    """Reads a number at the beginning of a list of words in lower case.

    Args:
        words: words and signs; "-" between two words of a number is one of them.

    Returns:
        The number, and how many of the words it takes; None if it does not begin with one.

    >>> read_number_words(["two", "hundred", "and", "five", "apples"])
    (205, 4)
    """
    total = current = taken = 0
    for place, word in enumerate(words):
        if word in _VALUES and _VALUES[word] and not _follows(current, _VALUES[word]):
            break
        if word in _VALUES:
            current += _VALUES[word]
        elif word == "hundred":
            current = (current or 1) * 100
        elif word in SCALES:
            total, current = total + (current or 1) * SCALES[word], 0
        elif place == taken and taken and word in ("-", "and"):
            continue
        else:
            break
        taken = place + 1
    return (total + current, taken) if taken else None


def _follows(before: int, value: int) -> bool:
    """Whether a small number may follow what was read: "twenty one", but not "one twenty"."""
    if before == 0 or (before % 100 == 0 and value < 100):
        return True
    return before % 10 == 0 and before % 100 >= 20 and value < 10
