"""Denoising drawn as text."""

import io

import pytest
import torch
from rich.console import Console

from megatron_opdlm.generate.display import MASK_CELL, DenoisingDisplay, token_texts


class ByteTokenizer:
    """One token per byte of UTF-8."""

    def decode(self, token_ids):
        return bytes(token_ids).decode("utf-8", errors="replace")


TOKENIZER = ByteTokenizer()


@pytest.mark.parametrize(
    "text", ["plain", "a\u00e9b", "\u20ac\u20ac", "x\U0001f600", "\u00e9\n\u00e9"]
)
def test_token_texts_join_to_the_whole(text):
    texts = token_texts(TOKENIZER, list(text.encode()))
    assert "".join(texts) == text
    assert len(texts) == len(text.encode())


def test_bytes_that_are_no_character_stay_visible():
    assert token_texts(TOKENIZER, [0x61, 0xFF, 0x62]) == ["a", "\ufffd", "b"]


def steps(text, masked_at):
    """Observer arguments of a response that is decoded into `text`, one entry per step."""
    ids = torch.tensor(list(text.encode()))
    for masked in masked_at:
        flags = torch.zeros(len(ids), dtype=torch.bool)
        flags[masked] = True
        yield ids, flags


def draw(console, frames):
    with DenoisingDisplay(TOKENIZER, [2, 1], console=console) as display:
        for index, ids, masked in frames:
            display(index, ids, masked)
    return console.file.getvalue()


def test_plain_lines_show_masks_filling_in():
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    frames = [(0, *step) for step in steps("Qxab\n", [[2, 3, 4], [3], []])]
    lines = draw(console, frames).splitlines()
    assert lines == [
        "Qx",
        f"step   1  {MASK_CELL * 3}",
        f"step   2  a{MASK_CELL}\u23ce",
        "step   3  ab\u23ce",
    ]


def test_each_response_counts_its_own_steps():
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    frames = [(0, *next(steps("Qxa", [[]]))), (1, *next(steps("Zb", [[]])))]
    assert draw(console, frames).splitlines() == ["Qx", "step   1  a", "Z", "step   1  b"]


def test_a_terminal_highlights_what_is_new():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    display = DenoisingDisplay(TOKENIZER, [1], console=console)
    first, second = steps("Qab", [[2], []])
    with display:
        display(0, *first)
        frame = display.frame(0, *[part.tolist() for part in second])
    styles = {frame.plain[span.start : span.end]: str(span.style) for span in frame.spans}
    assert styles["Q"] == "dim"
    assert "green" in styles["b"]
    assert "a" not in styles or "green" not in styles["a"]
