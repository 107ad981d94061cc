"""A table of a report, as Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_opdlm.evaluation.table import markdown, markdown_text


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of plain text; each writer escapes what is markup to it."""

    name: str
    """Stem of its files."""
    title: str
    note: str
    """What a reader must know to read it, in plain text."""
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    """Number of columns, from the left, whose text begins at the left."""

    def to_markdown(self) -> str:
        """Returns title, table and note as Markdown."""
        body = markdown(self.header, self.rows, left=self.left)
        return f"## {markdown_text(self.title)}\n\n{body}\n{markdown_text(self.note)}\n"

    def to_latex(self) -> str:
        r"""Returns a floating table of LaTeX; it needs \usepackage{booktabs}."""
        columns = "l" * self.left + "r" * (len(self.header) - self.left)
        lines = [" & ".join(map(latex_text, line)) + r" \\" for line in (self.header, *self.rows)]
        return "\n".join([
            "% needs \\usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex_text(f'{self.title}. {self.note}')}}}",
            rf"\label{{tab:{re.sub(r'[^a-z0-9]+', '-', self.name.lower())}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ])  # fmt: skip


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\texttt{\char34}",  # \textquotedbl needs a font encoding that is not the default
    "`": r"\`{}",
    "[": "{[}",  # after a line's end, a bracket would be an argument
    "]": "{]}",
    "\u00b1": r"$\pm$",
    "\u0394": r"$\Delta$",
}
_LIGATURES = re.compile(r"([-',])(?=\1)")
"""Characters that LaTeX joins with an equal one after them, such as the hyphens of a dash."""


def latex_text(text: str) -> str:
    r"""Returns text that LaTeX prints as it is, in one line.

    >>> latex_text("50 % of a_b")
    '50 \\% of a\\_b'
    """
    plain = "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
    return _LIGATURES.sub(r"\1{}", plain)
