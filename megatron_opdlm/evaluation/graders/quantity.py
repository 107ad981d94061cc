r"""Reads what a statement such as "x = 14 apples, because 3 + 11 = 14" gives as its number.

A quantity is an expression with what belongs to it: words before it, and a unit, a percent sign or
further numbers behind it. A number that is only a part of what stands there (14x, 14 or 15, 14:30,
more than 14) is no quantity.
"""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_opdlm.evaluation.graders.arithmetic import Reader, Token
from megatron_opdlm.evaluation.graders.number_words import SCALES, read_number_words

Values = tuple[Fraction, ...]
"""What a quantity may mean: 50% is 50 or 0.5. Empty if it is no number."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LEAD = _words(
    "a an the is are be was that there about approximately approx around roughly nearly exactly "
    "only just simply precisely therefore thus then hence so also indeed still now actually equal "
    "equals to number value total of final answer it result correct"
)
"""Words between "the answer is" and its number that say nothing about the number."""
_REJECTING = _words(
    "not less more fewer greater under below above over least most between from except half third "
    "quarter twice double triple thrice sqrt root log ln lg sin cos tan exp max min gcd lcm either "
    "both neither nor mod modulo plus version"
)
"""Words before a number that make it a part, a bound, or what the answer is not."""
_OPERATIONS_BEFORE_OF = _words(
    "sum product difference quotient root square cube power multiple factorial logarithm half"
)
_OPERATIONS = _words(
    "pi squared cubed factorial choose mod modulo sqrt sin cos tan log ln exp plus minus over "
    "infinity raised"
)
"""Words behind a number that make it a part of an expression."""
_STOPPING = _words(
    "because since as so for with at after on within when if while every each than until during "
    "before which where namely per is was are were has have had makes make left"
)
"""Words behind a number after which another number is not a part of it."""
_UNITS = _words(
    "m g s h l L km cm mm dm nm kg mg lb lbs oz ft in yd mi mph kph ml mL cl hr hrs min mins sec "
    "secs ms kW kWh MB GB TB Hz kHz usd USD EUR GBP INR cents pm am degrees C F K yr yrs rs Rs pts "
    "pt px"
)
"""Units that may stand close to a number, or are one letter."""
_ORDINALS = _words("st nd rd th")
_BOUNDS = _words("more less fewer greater higher lower above below so")
_RELATIONS = frozenset("<>\u2264\u2265\u2260\u2208\u2261\u00b1\u2213_|")
_SCALES = (
    SCALES
    | {f"{word}s": value for word, value in SCALES.items()}
    | {"trillion": 10**12, "dozen": 12, "dozens": 12}
)
_JOINERS = {",", ";", "&", "and", "or"}


class QuantityReader(Reader):
    """Reads the quantity of a statement."""

    def __init__(self, tokens: list[Token]) -> None:
        """Takes the tokens of the statement."""
        super().__init__(tokens)
        self.skipped_words = False
        """Whether words stood before the quantity that may say something about it."""

    def statement(self) -> Values:
        """Reads sides of an equation up to the last one that is a number.

        Returns:
            What the number may mean; empty if there is none, or only a part of something.
        """
        values: Values = ()
        while True:
            start = self.place
            relation = self.tokens[start - 1].text if start else ""
            side = self.side()
            if side:
                values = values + side if relation == "\u2248" else side
            elif not self._skip_to_relation(start):
                return values if relation == "=" else ()
            if not self.at("=", "\u2248"):
                return values
            self.place += 1

    def side(self) -> Values:
        """Reads words, a number and what belongs to it; empty if this is no quantity."""
        if not self._skip_lead():
            return ()
        value = self._words()
        if value is None:
            value = self.expression()
        return () if value is None else self._rest((value,))

    def _skip_to_relation(self, start: int) -> bool:
        """Goes on to the next equals sign from a place, if there is one in the statement."""
        self.place = start
        while (token := self.peek()) is not None:
            if token.text in ("=", "\u2248"):
                return True
            if token.text.lower() in _REJECTING or token.text in _RELATIONS - {"_", "|"}:
                return False
            if token.text in (r"\in", r"\equiv", r"\ne", r"\neq", r"\pm", "because", "since"):
                return False
            self.place += 1
        return False

    def _skip_lead(self) -> bool:
        """Goes on to the number; returns whether it is one that stands for itself."""
        before = ""
        while (token := self.peek()) is not None:
            word = token.text.lower()
            if self._at_operand() or token.text == "[" or self._number_words() is not None:
                return not (before == "of" and self._operation_before_of())
            if token.text in "+-" and token.kind == "sign":
                return self._is_sign()
            if token.kind == "command" or word in _REJECTING or _is_variable(token):
                return False
            if token.kind == "word":
                if word in ("negative", "minus"):
                    self.tokens[self.place] = Token("sign", "-", token.start, token.end)
                    return True
                self.skipped_words |= word not in _LEAD and token.text not in _UNITS
            elif token.text in "=\u2248" or token.text not in ":,.*'#\u20ac\u00a3\u00a5\u20b9":
                return False
            before = word
            self.place += 1
        return False

    def _operation_before_of(self) -> bool:
        token = self.peek(-2)
        return token is not None and token.text.lower() in _OPERATIONS_BEFORE_OF

    def _is_sign(self) -> bool:
        """Whether a plus or minus is the sign of a number, not an operation on a word before it."""
        before = self.peek(-1)
        return before is None or before.kind != "word" or not self.glued()

    def _words(self) -> Fraction | None:
        found = self._number_words()
        if found is None:
            return None
        self.place += found[1]
        return self._with_fraction(Fraction(found[0]))

    def _number_words(self) -> tuple[int, int] | None:
        texts = [token.text.lower() for token in self.tokens[self.place : self.place + 12]]
        return None if texts[:2] == ["one", "of"] else read_number_words(texts)

    def _rest(self, values: Values) -> Values:
        """Reads the unit and what else follows a number; empty if the number is only a part."""
        words = 0
        while (token := self.peek()) is not None:
            if token.kind == "number":
                return () if words < 2 else values
            if token.kind == "word" or token.text in _JOINERS:
                read = self._word(values, words)
                if read is None:
                    return values
                values, words = read, words + 1
            elif token.text == "%":
                self.place += 1
                values = self._percent(values)
            elif token.text == "^" and words:
                self.place += 1
                self._atom()
            elif token.text in "-/" and self._joins_word():
                self.place += 2
                words += 1
            elif token.text in "*'\u20ac\u00a3\u00a5\u00a2\u20b9" and not self._operand_follows():
                self.place += 1
            elif token.text == r"\frac" and self._is_unit_fraction():
                return values
            else:
                return values if self._ends() else ()
            if not values:
                return ()
        return values

    def _word(self, values: Values, words: int) -> Values | None:
        """Reads a word behind a number; None if what belongs to the number ends here."""
        token = self.tokens[self.place]
        word, following = token.text.lower(), self.peek(1)
        then = "" if following is None else following.text.lower()
        if token.text in _JOINERS or (word in ("to", "through") and not words):
            return self._joined(values)
        if self.glued() and words == 0:
            return self._suffix(values, token)
        if word in ("percent", "percentage") or (word, then) == ("per", "cent"):
            self.place += 1 + (word == "per")
            return self._percent(values)
        if word in _SCALES:
            self.place += 1
            return values + tuple(value * _SCALES[word] for value in values)
        if word in ("out", "of", "in"):
            return self._share(values, words)
        if word in _OPERATIONS or (word == "by" and self._number_at(1)):
            return ()
        if word in _BOUNDS and then == "than" and self._number_at(2):
            return ()
        if _is_variable(token) and not (word == "a" and following is not None):
            return ()
        if word in _STOPPING:
            return None
        self.place += 1
        return values

    def _suffix(self, values: Values, token: Token) -> Values:
        """Reads letters that stand close to a number: 12km, 14th, 3k; others make it a part."""
        self.place += 1
        if token.text in ("k", "K"):
            return tuple(value * 1000 for value in values)
        if token.text.lower() in _ORDINALS:
            of, number = self.peek(), self.peek(1)
            is_part = of is not None and of.text == "of" and number is not None
            return () if is_part and number and number.kind == "number" else values
        is_unit = token.text in _UNITS or not _is_latin(token.text)
        return values if is_unit else ()

    def _percent(self, values: Values) -> Values:
        """A percent sign may be the unit of the question, or mean a division by 100."""
        of = self.peek()
        if of is not None and of.text == "of" and self._number_at(1):
            self.place += 1
            whole = self.expression()
            return () if whole is None else tuple(value * whole / 100 for value in values)
        return values + tuple(value / 100 for value in values)

    def _share(self, values: Values, words: int) -> Values | None:
        """Reads "out of 20", "of the 20" or "in 20"; a share may also be meant as a fraction."""
        out = self.at("out")
        place = self.place + out + 1
        of_the = place < len(self.tokens) and self.tokens[place].text in ("the", "these", "all")
        place += of_the
        is_number = place < len(self.tokens) and self.tokens[place].kind == "number"
        if not is_number or words or (out and self.tokens[self.place + 1].text != "of"):
            return None
        self.place = place
        whole = self.expression()
        if not whole:
            return ()
        if values[0].denominator != 1:
            return values + tuple(value * whole for value in values)
        return values + tuple(value / whole for value in values)

    def _joined(self, values: Values) -> Values | None:
        """Reads "or 15": a second number must mean the same as the first."""
        start = self.place
        while self.at(*_JOINERS, "to", "through", "about"):
            self.place += 1
        token, following = self.peek(), self.peek(1)
        if following is not None and following.text in ("=", "\u2248"):
            self.place += 2
        elif token is not None:
            is_bound = self.tokens[start].text == "or" and token.text.lower() in _BOUNDS
            if is_bound or (_is_variable(token) and token.text.lower() != "a"):
                return ()
        token = self.peek()
        is_number = token is not None and (self._at_operand() or token.text in "+-")
        share = self.peek(1)
        if not is_number or (share is not None and share.text == "of"):  # 18, 3 of them brown
            self.place = start
            return None
        other = self._nested(self.side) or ()
        return values if set(values) & set(other) else ()

    def _joins_word(self) -> bool:
        """Whether a word follows a sign, as in 14/day and 14-year-old."""
        word = self.peek(1)
        if word is None or word.kind != "word" or _is_variable(word):
            return False
        return self.at("/") or (self.glued() and self.tokens[self.place].end == word.start)

    def _operand_follows(self) -> bool:
        self.place += 1
        found = self._at_operand()
        self.place -= 1
        return found

    def _number_at(self, offset: int) -> bool:
        token = self.peek(offset)
        return token is not None and token.kind == "number"

    def _is_unit_fraction(self) -> bool:
        r"""Whether a \frac{m}{s} stands here, with units in place of numbers."""
        words = [t for t in self.tokens[self.place + 1 : self.place + 7] if t.text not in "{}"]
        return len(words) >= 2 and all(t.text in _UNITS or len(t.text) > 2 for t in words[:2])

    def _ends(self) -> bool:
        """Whether the sign at the place ends what is said about the number."""
        token, following = self.tokens[self.place], self.peek(1)
        if token.kind == "command" or token.text in _RELATIONS or token.text in "+*/^![{":
            return False
        if token.text == "(":
            return self._is_remark()
        number_follows = following is not None and following.kind == "number"
        if token.text == "-":
            return following is not None and following.kind == "word" and not self.glued()
        return not (number_follows and token.text in ":.")

    def _is_remark(self) -> bool:
        """Whether brackets hold a remark, and not a factor or another answer."""
        inside = []
        for token in self.tokens[self.place + 1 :]:
            if token.text == ")":
                break
            inside.append(token)
        return not any(_is_variable(token) for token in inside) and not (
            inside and inside[0].text in ("or", "and")
        )


def _is_variable(token: Token) -> bool:
    """Whether a token is a letter that stands for a number, and not a unit or an article."""
    text = token.text
    is_letter = token.kind == "word" and len(text) == 1 and text.lower() != text.upper()
    return is_letter and text not in _UNITS and text not in ("a", "A", "I")


def _is_latin(text: str) -> bool:
    return re.search(r"[A-Za-z\u0370-\u03ff]", text) is not None
