r"""Reads numbers and arithmetic in text and LaTeX, exactly: 1,200, 2 \frac{1}{2}, 7 \cdot 2, 3e4.

Text becomes tokens. `Reader.expression` reads the longest arithmetic expression at a place in them,
and says what it stands for as a fraction. What it cannot read, such as a letter, ends it; whether
that leaves a part of an expression is for the caller to see.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import factorial, isqrt
from typing import TypeVar

T = TypeVar("T")
MOST_DIGITS = 1000
"""Most digits of a number, above and below the line. Longer ones count as no number: Python
refuses to read them, or takes hours."""
_LIMIT = 10**MOST_DIGITS
_MOST_NESTING = 40
_LARGEST_FACTORIAL = 450

_SUPERSCRIPTS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-"
)
_SUPERSCRIPT = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_CLEANING = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|boxed|fbox)(?![A-Za-z])", ""),
        (r"\{,\}", ","),
        (r"\\!", ""),
        (r"\\[,;: ]|~|\\(?:thinspace|ensuremath)(?![A-Za-z])", " "),
        (r"\\q?quad(?![A-Za-z])", "  "),
        (r"\\(?:space|bf|rm|it|sf|tt|large|Large|huge|Huge)(?![A-Za-z])", " "),
        (r"\\(?:text)?color\s*\{[^{}]*\}|</?(?:b|i|u|em|strong|span|br|p|code)\s*/?>", " "),
        (r"\\[()\[\]]|\\?\$", " "),
        (r"\\%", "%"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:cdot|times|ast)(?![A-Za-z])|[\u00d7\u22c5\u00b7\u2217]", "*"),
        (r"\\div(?![A-Za-z])|[\u00f7\u2044]", "/"),
        (r"\\approx(?![A-Za-z])", "\u2248"),
        (r"\^\s*\\circ(?![A-Za-z])|\^\s*\{\s*\\circ\s*\}|\\degree(?![A-Za-z])|\u00b0", " degrees "),
        (r"\\(?:text|mbox|mathrm|textrm|textnormal|mathit|textit|operatorname)\s*\{([^{}]*)\}",
         r" \1 "),
        (r"\\(?:mathbf|textbf|mathsf|bm|boldsymbol)\s*\{([^{}]*)\}", r" \1 "),
        (r"\^\s*\{?\s*(st|nd|rd|th)\s*\}?(?![A-Za-z])", r"\1"),
        (r"\\[lc]?dots(?![A-Za-z])|\.{3,}|\u2026", " "),
        (r"(?<!\d)\*\*+|\*\*+(?!\d)|__+|[`\"\u201c\u201d]", " "),
        (r"\b(?:i\.e|e\.g)\.", " namely "),
        (r"[\u2212\u2013\u2011]", "-"),
        (r"\u2014", " ; "),
        (r"\u221a", r"\\sqrt"),
    )
]  # fmt: skip
_GROUPED = (
    r"\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d{1,3}(?:[ ]\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d|,\d)"
)
"""Digits in groups: 1,234,567 or 1 234 567, or 12,34,567 as in India."""
_TOKEN = re.compile(
    rf"""(?P<number>(?:{_GROUPED})(?:\.\d+)?
       |(?<![\d,.])\d+,\d+(?![\d,]|\.\d)
       |(?:\d+(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][-+]?\d+(?!\w))?)
    |(?P<word>[^\W\d_]+(?:['\u2019][^\W\d_]+)*)
    |(?P<command>\\(?:[A-Za-z]+|.))
    |(?P<sign>\S)""",
    re.VERBOSE | re.DOTALL,
)
_DECIMAL_COMMA = re.compile(r"\d+,\d+")


@dataclass(frozen=True)
class Token:
    """A number, word, LaTeX command or single sign of a text."""

    kind: str
    """"number", "word", "command" or "sign"."""
    text: str
    """The token, as it is written."""
    start: int
    """Place of its first character in the cleaned text."""
    end: int
    """Place after its last character."""


def clean(text: str) -> str:
    r"""Returns a text without LaTeX's spacing and fonts, and with one sign for each operation."""
    text = _SUPERSCRIPT.sub(lambda run: f"^{{{run[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _VULGAR.sub(lambda sign: " " + unicodedata.normalize("NFKC", sign[0]) + " ", text)
    text = unicodedata.normalize("NFKC", text)
    for pattern, new in _CLEANING:
        text = pattern.sub(new, text)
    return text


def tokens_of(text: str) -> list[Token]:
    """Returns the tokens of a cleaned text."""
    return [
        Token(match.lastgroup or "", match[0], match.start(), match.end())
        for match in _TOKEN.finditer(text)
    ]


def parse_decimal(text: str) -> Fraction | None:
    """Returns the value of a number without signs, such as "1,200.5e3"; None if it is too long."""
    is_decimal = _DECIMAL_COMMA.fullmatch(text) and not re.fullmatch(_GROUPED, text)
    text = text.replace(",", "." if is_decimal else "")
    digits, _, power = text.replace(" ", "").lower().partition("e")
    if max(len(digits), len(power)) > MOST_DIGITS or abs(int(power or 0)) > MOST_DIGITS:
        return None
    return Fraction(f"{digits}e{int(power or 0)}")


class Reader:
    """Reads expressions in a list of tokens."""

    def __init__(self, tokens: list[Token]) -> None:
        """Takes the tokens of a text."""
        self.tokens = tokens
        self.place = 0
        self._depth = 0

    def peek(self, offset: int = 0) -> Token | None:
        """Returns the token at the place, or some tokens after it; None beyond the ends."""
        place = self.place + offset
        return self.tokens[place] if 0 <= place < len(self.tokens) else None

    def at(self, *texts: str) -> bool:
        """Whether the token at the place is one of these."""
        token = self.peek()
        return token is not None and token.text in texts

    def glued(self) -> bool:
        """Whether no white space stands before the token at the place."""
        before, token = self.peek(-1), self.peek()
        return before is not None and token is not None and before.end == token.start

    def expression(self) -> Fraction | None:
        """Reads a sum of products; afterwards, the place is behind it.

        Returns:
            Its value; None if there is no expression at the place, or if it has no value, as 1/0.
        """
        return self._nested(self._sum)

    def _nested(self, read: Callable[[], T | None]) -> T | None:
        """Reads something that may hold itself; returns None if it does so too often."""
        self._depth += 1
        try:
            return None if self._depth > _MOST_NESTING else read()
        finally:
            self._depth -= 1

    def _sum(self) -> Fraction | None:
        sign = 1
        if self.at("+", "-"):
            sign = -1 if self.at("-") else 1
            self.place += 1
        value = self._product()
        if value is None:
            return None
        value *= sign
        while self.at("+", "-") or self._at_word("plus", "minus"):
            sign = -1 if self.at("-") or self._at_word("minus") else 1
            start = self.place
            self.place += 1
            if not self._at_operand():
                self.place = start
                break
            term = self._product()
            if term is None:
                return None
            value = _bounded(value + sign * term)
            if value is None:
                return None
        return value

    def _product(self) -> Fraction | None:
        value = self._power()
        while value is not None:
            start, operator = self.place, self._operator()
            if operator is None or not (self._at_operand() or self.at("-")):
                self.place = start
                break
            sign = -1 if self.at("-") else 1
            self.place += sign < 0
            factor = self._power()
            if factor is None or (operator == "/" and factor == 0):
                return None
            value = _bounded(sign * (value / factor if operator == "/" else value * factor))
        return value

    def _operator(self) -> str | None:
        """Reads "*", "/", their words, or nothing before a bracket that stands close."""
        if self.at("*", "/"):
            self.place += 1
            return self.tokens[self.place - 1].text
        if self._at_word("times", "x"):
            self.place += 1
            return "*"
        if self._at_word("divided"):
            self.place += 1
            self.place += self._at_word("by")
            return "/"
        return "*" if self.at("(") and self.glued() else None

    def _power(self) -> Fraction | None:
        value = self._atom()
        if value is not None and self.at("!") and self.glued():
            if value.denominator != 1 or not 0 <= value <= _LARGEST_FACTORIAL:
                return None
            self.place += 1
            value = Fraction(factorial(int(value)))
        if value is None or not self.at("^"):
            return value
        self.place += 1
        exponent = self._group() if self.at("{") else self._signed_power()
        return None if exponent is None else _raise(value, exponent)

    def _signed_power(self) -> Fraction | None:
        sign = -1 if self.at("-") else 1
        self.place += sign < 0
        exponent = self._nested(self._power)
        return None if exponent is None else sign * exponent

    def _atom(self) -> Fraction | None:
        token = self.peek()
        if token is None:
            return None
        if token.text in ("(", "[", "{"):
            return self._group()
        if token.kind == "number":
            self.place += 1
            return self._with_fraction(parse_decimal(token.text))
        if token.text == r"\frac":
            self.place += 1
            above, below = self._argument(), self._argument()
            return _bounded(above / below) if above is not None and below else None
        if token.text in (r"\sqrt", "sqrt"):
            self.place += 1
            return _root(self._argument())
        return None

    def _with_fraction(self, whole: Fraction | None) -> Fraction | None:
        """Reads the rest of a mixed number, such as 2 1/2, 2 \\frac{1}{2} or 2 and 1/2."""
        start = self.place
        self.place += self._at_word("and")
        if whole is not None and whole.denominator == 1:
            if self._at_word("a", "one") and self._is_word(self.peek(1), "half"):
                self.place += 2
                return whole + Fraction(1, 2)
            if self._at_part():
                part = self._atom_of_part()
                if part is not None and 0 < part < 1:
                    return whole + part
        self.place = start
        return whole

    def _at_part(self) -> bool:
        if self.at(r"\frac"):
            return True
        numbers = [self.peek(0), self.peek(2)]
        line = self.peek(1)
        return (
            line is not None
            and line.text == "/"
            and all(token is not None and token.text.isdecimal() for token in numbers)
        )

    def _atom_of_part(self) -> Fraction | None:
        if self.at(r"\frac"):
            return self._atom()
        above, below = (parse_decimal(self.tokens[self.place + i].text) for i in (0, 2))
        self.place += 3
        return above / below if above is not None and below else None

    def _argument(self) -> Fraction | None:
        r"""Reads what \frac or \sqrt takes: a group, or one digit as in \frac12."""
        token = self.peek()
        if token is None or token.kind != "number":
            return self._group()
        if len(token.text) > 1 and token.text.isdecimal():
            rest = Token("number", token.text[1:], token.start + 1, token.end)
            self.tokens[self.place : self.place + 1] = [rest]
            return Fraction(int(token.text[0]))
        self.place += 1
        return parse_decimal(token.text)

    def _group(self) -> Fraction | None:
        """Reads an expression in brackets."""
        closing = {"(": ")", "[": "]", "{": "}"}
        token = self.peek()
        if token is None or token.text not in closing:
            return None
        self.place += 1
        value = self.expression()
        if not self.at(closing[token.text]):
            return None
        self.place += 1
        return value

    def _at_operand(self) -> bool:
        token = self.peek()
        return token is not None and (
            token.kind == "number" or token.text in ("(", "{", r"\frac", r"\sqrt")
        )

    def _at_word(self, *words: str) -> bool:
        return self._is_word(self.peek(), *words)

    @staticmethod
    def _is_word(token: Token | None, *words: str) -> bool:
        return token is not None and token.text.lower() in words


def _raise(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        return None
    power = int(exponent)
    bits = max(abs(base.numerator), base.denominator).bit_length() - 1
    if bits * abs(power) > _LIMIT.bit_length():
        return None
    if base == 0 and power < 0:
        return None
    return base**power


def _root(value: Fraction | None) -> Fraction | None:
    """Returns a square root if it is a fraction."""
    if value is None or value < 0:
        return None
    root = Fraction(isqrt(value.numerator), isqrt(value.denominator))
    return root if root**2 == value else None


def _bounded(value: Fraction) -> Fraction | None:
    return value if max(abs(value.numerator), value.denominator) < _LIMIT else None
