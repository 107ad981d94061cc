"""Draws denoising in a terminal: tokens replace masks, block by block."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

MASK_CELL = "\u2591\u2591"
"""Two light shades, which stand for a masked position."""
UNREADABLE = "\ufffd"
"""The character that a tokenizer returns for bytes that are not a whole character."""
_PROMPT, _MASK, _NEW, _OLD = "dim", "grey50", "bold black on green", ""


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Returns the text of each token. Joined, these texts are the whole text.

    If the bytes of a character are spread over several tokens, the first token gets the character.

    Args:
        tokenizer: transformers tokenizer.
        token_ids: ids in order.
    """
    texts = [tokenizer.decode([token_id]) for token_id in token_ids]
    place = 0
    while place < len(texts):
        if UNREADABLE in texts[place]:
            for end in range(place + 2, min(place + 4, len(texts)) + 1):
                joined = tokenizer.decode(list(token_ids[place:end]))
                if UNREADABLE not in joined:
                    texts[place:end] = [joined] + [""] * (end - place - 1)
                    break
        place += 1
    return texts


class DenoisingDisplay:
    """An observer of the engine that shows responses while they are decoded, one after the other.

    In a terminal it redraws a panel in place. Otherwise it prints the prompt, and then one line per
    step.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_lengths: Sequence[int],
        *,
        console: Console,
        seconds_per_step: float = 0.0,
    ) -> None:
        """Prepares the display. Draws nothing yet.

        Args:
            tokenizer: transformers tokenizer.
            prompt_lengths: number of tokens of each prompt, in the order of the requests.
            console: console to draw on.
            seconds_per_step: shortest time that a step stays visible in a terminal.
        """
        self.tokenizer = tokenizer
        self.prompt_lengths = prompt_lengths
        self.console = console
        self.seconds_per_step = seconds_per_step
        self._live: Live | None = None
        self._index = -1
        self._step = 0
        self._shown: list[bool] = []

    def __enter__(self) -> DenoisingDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def __call__(self, index: int, token_ids: Tensor, still_masked: Tensor) -> None:
        """Draws one step of one response.

        Args:
            index: index of the request.
            token_ids: [L] int64, tokens through the end of the current block.
            still_masked: [L] bool, positions that are masked after this step.
        """
        if index != self._index:
            self._close()
            self._index, self._step, self._shown = index, 0, []
            if not self.console.is_terminal:
                self.console.print(Text(self._prompt(index, token_ids.tolist())), soft_wrap=True)
        self._step += 1
        frame = self.frame(index, token_ids.tolist(), still_masked.tolist())
        self._shown = [not masked for masked in still_masked.tolist()]
        if not self.console.is_terminal:
            self.console.print(Text(f"step {self._step:3d}  ").append_text(frame), soft_wrap=True)
            return
        panel = Panel(frame, title=f"denoising step {self._step}", title_align="left")
        if self._live is None:
            self._live = Live(panel, console=self.console, auto_refresh=False)
            self._live.start()
        self._live.update(panel, refresh=True)
        time.sleep(self.seconds_per_step)

    def frame(self, index: int, token_ids: Sequence[int], still_masked: Sequence[bool]) -> Text:
        """Returns the text of one step: prompt dimmed (terminal only), new tokens highlighted."""
        prompt_length = self.prompt_lengths[index]
        frame = Text()
        if self.console.is_terminal:
            frame.append(self._prompt(index, token_ids), style=_PROMPT)
        place = prompt_length
        while place < len(token_ids):
            if still_masked[place]:
                frame.append(MASK_CELL, style=_MASK)
                place += 1
                continue
            end = place
            while end < len(token_ids) and not still_masked[end]:
                end += 1
            texts = token_texts(self.tokenizer, token_ids[place:end])
            for position, text in enumerate(texts, place):
                is_old = position < len(self._shown) and self._shown[position]
                frame.append(self._readable(text), style=_OLD if is_old else _NEW)
            place = end
        return frame

    def _prompt(self, index: int, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids[: self.prompt_lengths[index]]))

    def _readable(self, text: str) -> str:
        """Returns the text, on one line if the steps are plain lines."""
        return text if self.console.is_terminal else text.replace("\n", "\u23ce")

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
