"""Tables against a parser of Markdown, and against an inverse of LaTeX's escapes."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt  # a dependency of rich

from megatron_opdlm.evaluation.sweep.tables import Table, latex_text

ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)
HOSTILE = (
    "a|b", "*x*", "_x_ x_y", "`c`", "<b>&amp;", "[l](u)", "\\", "\\|", "a\\", "100 %", "$5 & #1",
    "x^2 ~ {y}", "~~no~~", '"q"', "\u00b1 \u0394", "![i](j)", "a--b---c", "''x''", ",,y",
)  # fmt: skip


def table(*cells):
    return Table(name="t", title="T", note="N", header=("h", *cells), rows=[("r", *cells)])


def cells_of_markdown(text):
    """Text of the cells, as a parser of GitHub's tables shows it."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inline = [
        tokens[place + 1]
        for place, token in enumerate(tokens)
        if token.type in ("th_open", "td_open")
    ]
    assert all(child.type in ("text", "text_special") for each in inline for child in each.children)
    return ["".join(child.content for child in each.children) for each in inline]


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_text_as_it_is(text):
    shown = cells_of_markdown(table(text).to_markdown())
    assert shown == ["h", text, "r", text]


@given(st.lists(ASCII, min_size=1, max_size=3))
def test_markdown_shows_any_text(texts):
    shown = cells_of_markdown(table(*texts).to_markdown())
    expected = [" ".join(text.split()) for text in texts]
    assert [cell.strip() for cell in shown] == ["h", *expected, "r", *expected]


def test_control_markdown_without_escapes_is_another_text():
    plain = "| h | a\\|b *x* |\n| --- | --- |\n| r | y |\n"
    with pytest.raises(AssertionError):
        cells_of_markdown(plain)


COMMANDS = {
    r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^",
    r"\textless{}": "<", r"\textgreater{}": ">", r"\textbar{}": "|", r"\texttt{\char34}": '"',
    r"\`{}": "`", r"$\pm$": "\u00b1", r"$\Delta$": "\u0394", "{[}": "[", "{]}": "]",
    "-{}": "-", "'{}": "'", ",{}": ",",
}  # fmt: skip
LIGATURES = ("--", "''", ",,")
"""What LaTeX prints as another character; a backquote is always a command."""


def shown_by_latex(text):
    """The text that LaTeX prints, and nothing else of its markup may be left."""
    assert not any(pair in text for pair in LIGATURES), f"a ligature is in {text}"
    pattern = "|".join(map(re.escape, sorted(COMMANDS, key=len, reverse=True)))
    parts = re.findall(rf"({pattern})|\\([&%$#_{{}}])|(.)", text)
    shown = []
    for command, escaped, other in parts:
        assert other not in tuple("\\&%$#_{}~^") or not other, f"{other} is markup in {text}"
        shown.append(COMMANDS[command] if command else escaped or other)
    return "".join(shown)


@pytest.mark.parametrize("text", HOSTILE)
def test_latex_prints_text_as_it_is(text):
    assert shown_by_latex(latex_text(text)) == text


@given(ASCII)
def test_latex_prints_any_text(text):
    assert shown_by_latex(latex_text(text)) == " ".join(text.split())


def test_control_latex_without_escapes_is_markup():
    with pytest.raises(AssertionError, match="is markup"):
        shown_by_latex("50 % of a_b")
    with pytest.raises(AssertionError, match="a ligature is in a--b"):
        shown_by_latex("a--b")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_row_of_latex_has_as_many_cells_as_columns(text):
    lines = table(text, text).to_latex().splitlines()
    rows = [line for line in lines if line.endswith(r"\\")]
    assert len(rows) == 2
    assert all(len(re.findall(r"(?<!\\)&", row)) == 2 for row in rows)
    assert r"\begin{tabular}{lrr}" in lines
