r"""Where a response states its final answer: in a box, after "####", or after "the answer is".

The last of these counts. A remark such as "I hope this answer is clear" states nothing; the
graders see that, and go back to the statement before it. Every search is linear in the length of
the response, because a model may repeat anything a million times.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

_WINDOW = 4000
"""Most characters of a statement that are read. What is longer is no answer."""
_MOST_MARKERS = 100
"""Most boxes, "####" and words "answer" that are looked at, from the last one back."""

_ANSWER = (
    r"(?:(?<![^\W_])(?:answers?|ans|antwort|r[e\u00e9]ponse|respuesta|resposta|risposta|jawaban"
    r"|\u043e\u0442\u0432\u0435\u0442|\u0627\u0644\u0625\u062c\u0627\u0628\u0629"
    r"|\u0627\u0644\u062c\u0648\u0627\u0628|\u0989\u09a4\u09cd\u09a4\u09b0)(?![^\W_])"
    r"|\u7b54\u6848|\u7b54\u3048|\u6b63\u89e3|\uc815\ub2f5|\u7b54(?=[:\uff1a])"
    r"|\u0e04\u0e33\u0e15\u0e2d\u0e1a)"
)
"""The word "answer" in English, German, French, Spanish, Portuguese, Italian, Indonesian, Russian,
Arabic (two), Bengali, Chinese, Japanese (two), Korean, Chinese again, and Thai."""
_IS = (
    r"(?:(?<![^\W_])(?:is|are|was|be|equals?|isn['\u2019]t|ist|lautet|est|es|\u00e9|\u00e8|adalah)(?![^\W_])"
    r"|\u662f|\u4e3a|\u70ba|\u306f|\uc740|\ub294|\u0e04\u0e37\u0e2d|\u9009|\u9078|[:\uff1a=])"
)
_MARKER = re.compile(
    r"(?P<box>\\(?:boxed|fbox)(?![a-z]))|(?P<hashes>(?<!\#)\#{4}(?!\#))" rf"|(?P<words>{_ANSWER})",
    re.IGNORECASE,
)
_ANNOUNCING = re.compile(
    rf"(?<=<answer)>|[*_\"'`]*\s+[-\u2013\u2014]\s|[^.\n:\uff1a=?!\u3002]{{0,60}}?{_IS}"
    r"|(?P<heading>[*_ \t]*$)",
    re.IGNORECASE | re.MULTILINE,
)
"""What follows the word "answer" where it announces one: "to this question is", ":", or nothing
else on the line."""
_BEFORE_HEADING = re.compile(r"[#>*_\s]*(?:[^\W\d_]{1,12}\s+){0,3}\Z")
_NOT = re.compile(r"not\b|n['\u2019]t\b|\u4e0d", re.IGNORECASE)
_OPENING = re.compile(r"(?:\n[ \t]*[-*\u2022][ \t]+|[\s*_>`:\uff1a]|\\\[|\\\(|\$\$)*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(
    r"[\s$]*(?:[,;&]|\\text\s*\{\s*(?:and|or)\s*\}|,?\s*(?:and|or))[\s$]*", re.IGNORECASE
)
_BEHIND_BOX = re.compile(
    r"(?:\s*\\pi(?![A-Za-z])|\s*\\sqrt\s*(?:\{[^{}]*\}|\d)"
    r"|\s*\^\s*(?!\{?\s*(?:\\circ|st\b|nd\b|rd\b|th\b))(?:\{[^{}]*\}|\w))*"
)
"""A factor or an exponent behind a box: what stands in the box is a part of the answer."""
_MINUS_BEFORE = re.compile(r"(?:^|[=$(\[:]|\bis)\s*[-\u2212]\s*\Z")


@dataclass(frozen=True)
class Statement:
    """What a response states as its answer."""

    text: str
    """Text of the answer, without the words or the box around it; one line of it if words announce
    it, and the whole content of a box."""
    announced_by: str
    """"box", "hashes" (for "####") or "words"."""
    end: int
    """Place in the response where the announcement ends, and the text begins."""


def statements(response: str) -> Iterator[Statement]:
    r"""Yields the statements of a response, the last one first. Empty boxes are left out.

    Boxes with only a comma, "and" or "or" between them are one statement.

    >>> [each.text for each in statements(r"The answer is 3. No: \boxed{\frac{1}{2}}")]
    ['\\frac{1}{2}', '3. No: \\boxed{\\frac{1}{2}}']
    """
    markers = list(deque(_MARKER.finditer(response), _MOST_MARKERS))
    first_joined = len(markers)
    for place in range(len(markers) - 1, -1, -1):
        marker = markers[place]
        kind = marker.lastgroup or ""
        if kind == "box":
            if place < first_joined:
                first_joined, text = _joined_boxes(response, markers, place)
                if text.strip():
                    yield Statement(text, kind, marker.end())
        elif not _is_boxed(response, markers, place):
            if kind == "hashes":
                yield Statement(_line(response, marker.end()), kind, marker.end())
            else:
                announced = _announced(response, marker)
                if announced is not None:
                    yield announced


def _announced(response: str, marker: re.Match[str]) -> Statement | None:
    """Returns what the word "answer" announces; None if it announces nothing."""
    found = _ANNOUNCING.match(response, marker.end())
    if found is None or (
        found["heading"] is not None and not _is_heading(response, marker.start())
    ):
        return None
    text = _first_line(response[found.end() : found.end() + _WINDOW])
    return Statement("not " * bool(_NOT.search(found[0])) + text, "words", found.end())


def _is_boxed(response: str, markers: list[re.Match[str]], place: int) -> bool:
    """Whether a marker is a part of what a box before it holds."""
    for earlier in reversed(markers[:place]):
        if earlier.lastgroup == "box":
            return _box(response, earlier)[1] > markers[place].start()
    return False


def _joined_boxes(response: str, markers: list[re.Match[str]], last: int) -> tuple[int, str]:
    """Returns the place of the first marker of a row of boxes, and the contents of the row."""
    first, contents = last, [_box(response, markers[last])[0]]
    while first > 0 and markers[first - 1].lastgroup == "box":
        text, end = _box(response, markers[first - 1])
        start = markers[first].start()
        if not (end <= start <= end + 40 and _BETWEEN_BOXES.fullmatch(response, end, start)):
            break
        contents.insert(0, text)
        first -= 1
    return first, ", ".join(contents)


def _box(response: str, marker: re.Match[str]) -> tuple[str, int]:
    """Returns what a box holds, and where it ends. A box that is never closed holds its line."""
    start = marker.end()
    while start < len(response) and response[start].isspace():
        start += 1
    sign = "-" * bool(_MINUS_BEFORE.search(response[max(0, marker.start() - 20) : marker.start()]))
    if response[start : start + 1] != "{":
        bare = re.compile(r"[^\s${}]*(?:\{[^{}\s]*\})*").match(response, start, start + _WINDOW)
        end = start if bare is None else bare.end()
        return sign + response[start:end].rstrip(".,;"), end
    depth = 0
    for brace in _BRACES.finditer(response, start, start + _WINDOW):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            content = response[start + 1 : brace.start()]
            behind = _BEHIND_BOX.match(response, brace.end(), brace.end() + _WINDOW)
            factors = "" if behind is None else behind[0]
            content = f"({content}){factors}" if factors else content
            return (f"-({content})" if sign else content), brace.end() + len(factors)
    line = _line(response, start + 1)
    return sign + line, start + 1 + len(line)


def _is_heading(response: str, start: int) -> bool:
    """Whether the line has at most three words before "answer", such as "## Final answer"."""
    before = response[max(0, start - 60) : start]
    return _BEFORE_HEADING.match(before[before.rfind("\n") + 1 :]) is not None


def _line(response: str, start: int) -> str:
    end = response.find("\n", start, start + _WINDOW)
    return response[start : end if end >= 0 else start + _WINDOW]


def _first_line(text: str) -> str:
    """Returns the first line that says something, without what opens it."""
    opening = _OPENING.match(text)
    text = text[opening.end() if opening else 0 :]
    return text.partition("\n")[0].partition("</")[0]
