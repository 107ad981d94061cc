r"""Brings mathematical answers into one spelling, and takes tuples, sets and intervals apart."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_UNICODE = {
    "\u2212": "-", "\u2013": "-", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ",
    "\u00f7": "/", "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u222a": r"\cup ", "\u2264": r"\le ",
    "\u2265": r"\ge ", "\u2260": r"\ne ", "\u2208": r"\in ", "\u00b1": r"\pm ",
    "\u00b0": r"^\circ ", "\u2205": r"\emptyset ", "\u00b2": "^2", "\u00b3": "^3",
}  # fmt: skip
_TEXT = r"\\(?:text|mbox|mathrm|textrm|textnormal|mathit|textit|textbf|mathbf|mathsf|operatorname)"
_SPELLINGS = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\(?:displaystyle|textstyle|left|right|[bB]igg?[lr]?)(?![A-Za-z])", ""),
        (r"\\(?:boxed|fbox)(?![A-Za-z])", ""),
        (r"\\(?:begin|end)\s*\{(?:aligned|align\*?|array|gathered|equation\*?)\}", ""),
        (r"\{,\}\s*", ","),
        (r",\s*\\!\s*", ","),
        (r"(?<!\\)\\!|\\?\$|\*\*", ""),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])|\n", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:varnothing|O)(?![A-Za-z])", r"\\emptyset"),
        (r"\\geq(?![A-Za-z])", r"\\ge"),
        (r"\\leq(?![A-Za-z])", r"\\le"),
        (r"\\neq(?![A-Za-z])", r"\\ne"),
        (r"\\(?:lbrace|\{)", r"\\{"),
        (r"\\(?:rbrace|\})", r"\\}"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (rf",?\s*(?:{_TEXT}\s*\{{\s*(?:and|or|,)\s*\}}|(?<![A-Za-z])(?:and|or)(?![A-Za-z]))", ","),
        (r"\\(sin|cos|tan|cot|sec|csc)\s*\(?\s*(\d+)\s*\^\s*\{?\s*\\circ\s*\}?\s*\)?",
         r"\\\1(\\frac{\2\\pi}{180})"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])", " "),
        (r"\\overline\s*\{([A-Z]+)\}", r"\1"),
        (r"\\mathrm\{i\}|(?<=\d)i(?![A-Za-z])", " i"),
    )
]  # fmt: skip
_GROUPED = re.compile(r"-?\d{1,3}(?:, ?\d{3})+(?:\.\d+)?(?!\d)")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
_UNIT = re.compile(
    rf"(?<=[\d}}\s)])\s*{_TEXT}\s*\{{([^{{}}]*)\}}(?:\s*\^\s*\{{?[-\d]+\}}?)?\s*$"
    r"|(?<=\d)\s+(?:degrees|cents|dollars|units?|square units?|cm|km|mm|feet|inches)\s*$"
)
_NO_UNIT = re.compile(r"\d|hundred|thousand|illion|dozen|percent|pi\b")
_TEXT_BEFORE = re.compile(rf"^{_TEXT}\s*\{{[^{{}}]*(?:is|:|=)\s*\}}\s*")
_MEMBER = re.compile(r"^[A-Za-z]\s*\\in\s*(?=[(\[\]\\{])")
_POINT_NAME = re.compile(r"^\(\s*[a-z](?:\s*,\s*[a-z])+\s*\)\s*=\s*(?=\()")
_NAME = re.compile(r"^\s*([A-Za-z](?:_\{?\w+\}?)?(?:\([a-z]\))?)\s*=\s*(?!=)")
_RELATION = r"\s*(<|>|\\le|\\ge)(?![A-Za-z])\s*"
_BOUND = re.compile(rf"([^<>]+?){_RELATION}([^<>]+)")
_BETWEEN = re.compile(r"([^<>]+?)\s*(<|\\le)\s*[A-Za-z]\s*(<|\\le)(?![A-Za-z])\s*([^<>]+)")
_VARIABLE = re.compile(r"\s*[A-Za-z]\s*")
_FRENCH = re.compile(r"^\](.+)\[$")


@dataclass(frozen=True)
class Parts:
    """An answer taken apart."""

    kind: str
    """"()", "[)", "(]" or "[]" (a tuple or an interval), "set", "list", "union", or "" for one
    expression."""
    items: list[str]
    """The parts, or the expression."""


def canonical(text: str) -> str:
    r"""Returns an answer in one spelling, without units, degrees, currency and fonts.

    >>> canonical(r"\left( \dfrac{1}{2}, 12{,}345\,\text{cm} \right].")
    '( \\frac{1}{2}, 12,345 \\text{cm} ]'
    >>> canonical(r"\$12{,}345 \text{ per day}")
    '12345'
    """
    for sign, spelling in _UNICODE.items():
        text = text.replace(sign, spelling)
    text = unicodedata.normalize("NFKC", text)
    for pattern, new in _SPELLINGS:
        text = pattern.sub(new, text)
    text = _REPEATING.sub(_repeating_fraction, text)
    text = text.strip().rstrip(".,;").strip()
    unit = _UNIT.search(text)
    if unit is not None and not _NO_UNIT.search(unit[0].rpartition("}")[0]):
        text = text[: unit.start()].strip()
    text = _TEXT_BEFORE.sub("", text)
    while text.startswith("{") and _closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "").replace(" ", "")
    return text


def words_of(text: str) -> str | None:
    r"""Returns a text in words, in lower case and without articles; None if it is mathematics.

    >>> words_of(r"\text{An ellipse.}"), words_of("x + 1")
    ('ellipse', None)
    """
    plain = re.sub(rf"{_TEXT}\s*\{{([^{{}}]*)\}}", r" \1 ", text)
    plain = re.sub(r"[\s.`*_\"']+", " ", plain).strip()
    if not re.fullmatch(r"[^\W\d_]{2,}(?:[ ,-]+[^\W\d_]+)*", plain):
        return None
    return re.sub(r"^(?:an?|the) ", "", plain.lower())


def without_name(text: str) -> tuple[str, str]:
    """Returns the name on the left of an equation such as f(x) = 3, and its last side.

    The name is empty if there is none.
    """
    match = _NAME.match(text)
    if match is None:
        return "", text
    rest = text[match.end() :]
    return match[1], rest.rpartition("=")[2] if not re.search(r"[<>]|\\[lgn]e", rest) else rest


def take_apart(text: str) -> Parts:
    r"""Takes a canonical answer apart at the commas or unions that are in no bracket.

    >>> take_apart(r"(1, \frac{1}{2}]"), take_apart("x = 1, x = 3")
    (Parts(kind='(]', items=['1', '\\frac{1}{2}']), Parts(kind='list', items=['x = 1', 'x = 3']))
    """
    text = _POINT_NAME.sub("", _MEMBER.sub("", text.strip()))
    text = _FRENCH.sub(r"(\1)", text)
    unions = _split(text, r"\cup")
    if len(unions) > 1:
        return Parts("union", unions)
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return Parts("set", _with_signs(_split(text[2:-2], ",")))
    if text[:1] in ("(", "[") and _closing(text, 0) == len(text) - 1:
        items = _split(text[1:-1], ",")
        if len(items) > 1:
            return Parts(text[0] + text[-1], items)
    items = _with_signs(_split(text, ",") if len(_split(text, ",")) > 1 else _split(text, ";"))
    named = sorted(without_name(item) for item in items)
    names = {name for name, _ in named}
    if len(items) > 1 and "" not in names and len(names) == len(items):
        return Parts("()", [value for _, value in named])  # x = 3, y = 4
    return Parts("list", items) if len(items) > 1 else Parts("", items)


def as_intervals(parts: Parts) -> Parts:
    r"""Returns inequalities as intervals: -2 < x \le 7 as (-2, 7], "x < 1 or x > 3" as a union.

    What is no inequality stays as it is.
    """
    intervals = [_interval(item) for item in parts.items]
    if parts.kind not in ("", "list") or not all(intervals):
        return parts
    found = [interval for interval in intervals if interval is not None]
    return take_apart(found[0]) if len(found) == 1 else Parts("union", found)


def _interval(text: str) -> str | None:
    match = _BETWEEN.fullmatch(text)
    if match is not None:
        return _bracketed(match[1], match[2] != "<", match[4], match[3] != "<")
    match = _BOUND.fullmatch(text)
    if match is None:
        return None
    name, relation, bound = match.groups()
    if not _VARIABLE.fullmatch(name):  # 3 < x
        name, bound = bound, name
        relation = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}[relation]
    if not _VARIABLE.fullmatch(name) or _VARIABLE.fullmatch(bound):
        return None
    closed = relation not in ("<", ">")
    if relation in ("<", "\\le"):
        return _bracketed(r"-\infty", False, bound, closed)
    return _bracketed(bound, closed, r"\infty", False)


def _bracketed(start: str, starts_closed: bool, end: str, ends_closed: bool) -> str:
    opening, closing = "[" if starts_closed else "(", "]" if ends_closed else ")"
    return f"{opening}{start}, {end}{closing}"


def _repeating_fraction(match: re.Match[str]) -> str:
    whole, before, again = match[1] or "0", match[2], match[3]
    below = (10 ** len(again) - 1) * 10 ** len(before)
    above = int(whole + before + again) - int(whole + before)
    return rf"\frac{{{above}}}{{{below}}}"


def _with_signs(items: list[str]) -> list[str]:
    r"""Returns the items with both of what \pm stands for."""
    found = []
    for item in items:
        if item.count(r"\pm") == 1:
            found += [item.replace(r"\pm", "+").lstrip("+ "), item.replace(r"\pm", "-")]
        else:
            found.append(item)
    return found


def _closing(text: str, start: int) -> int:
    """Returns the place of the bracket that closes the one at `start`; -1 if there is none."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] in "([{":
            depth += 1
        elif text[place] in ")]}":
            depth -= 1
            if depth == 0:
                return place
    return -1


def _split(text: str, separator: str) -> list[str]:
    depth, items, start, place = 0, [], 0, 0
    while place < len(text):
        if text[place] in "([{":
            depth += 1
        elif text[place] in ")]}":
            depth -= 1
        elif depth == 0 and text.startswith(separator, place):
            items.append(text[start:place].strip())
            place += len(separator)
            start = place
            continue
        place += 1
    items.append(text[start:].strip())
    return items
