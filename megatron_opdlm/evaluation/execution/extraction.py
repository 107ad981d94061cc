"""Finds the program in a response."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from dataclasses import dataclass

_PYTHON = {"python", "python3", "py", "py3"}
_CODE_LINE = re.compile(r"(?:async +def|def|class|import|from)\s+\w|@\w")
_DEFINITION = re.compile(r"^[ \t]*(?:async +def|def|class)\s+(\w+)|^(\w+)\s*=[^=]", re.MULTILINE)
_MARKED = re.compile(r"\[BEGIN\](.*?)(?:\[DONE\]|\Z)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """The program of a response."""

    code: str
    """The program."""
    fenced: bool
    """Whether the response marks where it begins and ends."""


@dataclass(frozen=True)
class _Block:
    language: str
    lines: list[str]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def extract(response: str, names: Set[str]) -> Extracted:
    """Returns the program of a response.

    It is the last block between fences that defines one of the names, else the last block of
    Python, else the last block; models write drafts before the answer and examples after it.
    (LiveCodeBench's harness takes the last block, too, OpenCompass's for HumanEval the first.) A
    block that never ends goes to the end of the response. Without fences the program is what is
    between [BEGIN] and [DONE] (MBPP's own prompt), else all from the first line on that looks like
    code, else the whole response.

    Args:
        response: text of the response.
        names: names that a solution defines; may be empty.
    """
    text = response.replace("\r\n", "\n").replace("\r", "\n")
    blocks = list(_blocks(text))
    if blocks:
        python = [block for block in blocks if block.language in _PYTHON]
        maybe = [block for block in blocks if block.language in _PYTHON or not block.language]
        defining = (block for block in reversed(maybe) if defines(block.text, names))
        chosen = next(defining, None) or (python or maybe or blocks)[-1]
        return Extracted(code=chosen.text, fenced=True)
    marked = _MARKED.search(text)
    if marked:
        return Extracted(code=marked[1].strip().strip("'"), fenced=True)
    if not names or defines(text, names):
        text = _from_first_code_line(text)
    return Extracted(code=text, fenced=False)


def defines(code: str, names: Set[str]) -> bool:
    """Says whether a program seems to define one of the names."""
    found = _DEFINITION.findall(code)
    return any(name in names for pair in found for name in pair if name)


def body_readings(body: str) -> list[str]:
    r"""Returns the ways to read a response as the body of a function, the best first.

    A body ends before the first line that is not indented. A tokenizer or a model may have dropped
    the spaces before the first line, or those before all lines.

    >>> body_readings("return x\n")[0]
    '    return x'
    """
    lines = body.strip("\n").split("\n")
    indented = ["    " + line if line.strip() else line for line in lines]
    if lines[0][:1] in (" ", "\t"):
        short = len(lines[0]) - len(lines[0].lstrip(" "))
        first = lines[0] if short >= 4 or lines[0][0] == "\t" else "    " + lines[0].lstrip(" ")
        return [_until_dedent([first, *lines[1:]])]
    return [_until_dedent([indented[0], *lines[1:]]), "\n".join(indented)]


def _until_dedent(lines: list[str]) -> str:
    kept = []
    for line in lines:
        if line[:1] not in ("", " ", "\t"):
            break
        kept.append(line)
    return "\n".join(kept)


def _from_first_code_line(text: str) -> str:
    lines = text.split("\n")
    first = next((i for i, line in enumerate(lines) if _CODE_LINE.match(line)), 0)
    return "\n".join(lines[first:])


def _blocks(text: str) -> Iterator[_Block]:
    """Yields the blocks between fences, in order."""
    block: _Block | None = None
    margin = 0
    for line in text.split("\n"):
        fence = _fence(line)
        if fence is None:
            if block is not None:
                block.lines.append(line[min(margin, len(line) - len(line.lstrip())) :])
            continue
        before, language = fence
        if block is not None:
            if before:
                block.lines.append(before)
            yield block
        if block is None or language:  # a fence with a language begins a block, always
            block, margin = _Block(language, []), len(line) - len(line.lstrip())
        else:
            block = None
    if block is not None:
        yield block


def _fence(line: str) -> tuple[str, str] | None:
    """Returns what stands before a fence, and its language; None if the line has no fence.

    A fence begins a line, or ends one: "Here it is: ```python". A response is long and may be
    anything, so this is no regular expression, which could take quadratic time.
    """
    stripped = line.lstrip(" \t>*-")
    if stripped.startswith(("```", "~~~")):
        words = stripped.lstrip("`~").split()
        return None if "`" in stripped.lstrip("`") else ("", words[0].lower() if words else "")
    before, fence, after = line.rpartition("```")
    after = after.strip()
    if not fence or not (after.isalnum() or after == ""):
        return None
    return before.rstrip("` \t"), after.lower()
