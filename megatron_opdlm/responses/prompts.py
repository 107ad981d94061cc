"""Prompts: their files, the chat template, and the order in which rollouts take them.

A prompt is tokenised once, here. After that it is a tensor of ids; its text is never read again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opdlm.convert.chat_template import NO_CHAT_TEMPLATE, TEMPLATE_ERRORS
from megatron_opdlm.diffusion import randomness
from megatron_opdlm.responses.entries import Entry, Messages, read_entries
from megatron_opdlm.responses.rendering import require_rendering

logger = logging.getLogger(__name__)

_CHUNK = 1024  # prompts per call: enough for the tokenizer's threads, and the bar still moves


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt as the file gives it."""

    id: str
    """Unique name. It is the line number if the file gives none. Random numbers depend on it."""
    messages: Messages
    """Conversation so far. Its last turn is the one that the student answers."""
    domain: str | None = None
    """Subject of the prompt, for reports."""
    response: str | None = None
    """Response to train on; None unless `load_prompts` was told to read it."""
    where: str
    """File and line, or position in a JSON list, for messages; counted from 1."""


@dataclass(frozen=True, kw_only=True)
class PromptTokens:
    """A prompt ready to decode."""

    index: int
    """Index in the list that was tokenised."""
    id: str
    """The prompt's id."""
    ids: Tensor
    """[P] int64 on the CPU, including chat template and generation prompt."""


@dataclass(frozen=True, kw_only=True)
class TokenizedPrompts:
    """The prompts that `tokenize_prompts` kept and those that it left out."""

    kept: list[PromptTokens]
    """Prompts within the limit, in file order."""
    dropped: list[tuple[str, int]]
    """(id, number of tokens) of every prompt over the limit."""


def load_prompts(path: str | Path, *, with_responses: bool = False) -> list[Prompt]:
    """Reads a prompt file: JSONL, or one JSON list.

    An entry is an object with `prompt` or `question` (text of one user turn) or `messages`, and
    optionally `id` and `domain`. Other keys are ignored.

    Args:
        path: file in UTF-8.
        with_responses: whether every entry must also have a `response`.

    Returns:
        The prompts in file order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, an entry is empty or malformed, or two entries have the same
            id; the message names file and line.
    """
    return make_prompts(read_entries(path), Entry.messages, with_responses=with_responses)


def make_prompts(
    entries: Sequence[Entry],
    messages: Callable[[Entry], Messages],
    *,
    with_responses: bool = False,
) -> list[Prompt]:
    """Makes a prompt from each entry.

    Args:
        entries: entries from `read_entries`.
        messages: function that returns the conversation of an entry.
        with_responses: whether every entry must also have a `response`.

    Raises:
        ValueError: an entry is malformed, or two entries have the same id; the message names file
            and line.
    """
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    for entry in entries:
        prompt = Prompt(
            id=entry.label("id") or str(entry.number),
            messages=messages(entry),
            domain=entry.label("domain"),
            response=entry.text("response") if with_responses else None,
            where=entry.where,
        )
        if prompt.id in seen:
            raise ValueError(
                f"{entry.where}: id={prompt.id} must be unique and stands at {seen[prompt.id]} "
                "too; rename one"
            )
        seen[prompt.id] = entry.where
        prompts.append(prompt)
    return prompts


def tokenize_prompts(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    *,
    enable_thinking: bool,
    max_prompt_tokens: int,
    progress: bool = False,
) -> TokenizedPrompts:
    """Renders prompts with the chat template and tokenises them once.

    Prompts over the limit are left out here, together with their ids. So later data always belong
    to the right prompt.

    Args:
        prompts: prompts from `load_prompts`.
        tokenizer: a transformers tokenizer with a chat template and a mask token.
        enable_thinking: passed to the template.
        max_prompt_tokens: length of the longest prompt to keep, including the template.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the tokenizer has no mask token or no template; a prompt is refused by the
            template, contains the mask token or renders to nothing; or no prompt is within the
            limit.
    """
    from tqdm import tqdm

    mask_token_id = _require_tokenizer(tokenizer)
    kept: list[PromptTokens] = []
    dropped: list[tuple[str, int]] = []
    with tqdm(total=len(prompts), desc="tokenising prompts", disable=not progress) as bar:
        for start in range(0, len(prompts), _CHUNK):
            chunk = prompts[start : start + _CHUNK]
            try:
                rows = tokenizer.apply_chat_template(
                    [prompt.messages for prompt in chunk],
                    add_generation_prompt=True,
                    enable_thinking=enable_thinking,
                    tokenize=True,
                    return_dict=False,
                )
            except TEMPLATE_ERRORS:
                require_rendering(chunk, tokenizer, enable_thinking=enable_thinking)
                raise  # the template is not the cause
            for index, (prompt, ids) in enumerate(zip(chunk, rows, strict=True), start):
                _check_ids(prompt, ids, mask_token_id, tokenizer.mask_token)
                if len(ids) > max_prompt_tokens:
                    dropped.append((prompt.id, len(ids)))
                else:
                    ids_P = torch.tensor(ids, dtype=torch.int64)
                    kept.append(PromptTokens(index=index, id=prompt.id, ids=ids_P))
            bar.update(len(chunk))
    _report_dropped(dropped, len(prompts), max_prompt_tokens)
    return TokenizedPrompts(kept=kept, dropped=dropped)


@dataclass(frozen=True, kw_only=True)
class PromptSampler:
    """Chooses the prompts of each rollout: shuffled epochs, as a function of the rollout's index.

    There is no state to save: a resumed run asks for the step with which it continues. The prompts
    left at the end of an epoch, too few for a rollout, wait for later epochs. So one rollout never
    has a prompt twice.
    """

    num_prompts: int
    """Number of prompts to choose from."""
    prompts_per_rollout: int
    """Number of prompts of one rollout."""
    seed: int
    """Seed of the run."""

    def __post_init__(self) -> None:
        if self.num_prompts < self.prompts_per_rollout:
            raise ValueError(
                f"prompts_per_rollout={self.prompts_per_rollout} must be at most the number of "
                f"prompts, {self.num_prompts}; use {self.num_prompts} or less, or add prompts"
            )

    @property
    def rollouts_per_epoch(self) -> int:
        """Number of rollouts before the order is shuffled again."""
        return self.num_prompts // self.prompts_per_rollout

    def batch(self, rollout_step: int) -> list[int]:
        """Returns the indices of a rollout's prompts, all different.

        Args:
            rollout_step: index of the rollout, from 0.
        """
        epoch, place = divmod(rollout_step, self.rollouts_per_epoch)
        first = place * self.prompts_per_rollout
        return self._order(epoch)[first : first + self.prompts_per_rollout]

    def places_before(self, rollout_step: int) -> set[int]:
        """Returns the indices of all prompts that earlier rollouts took."""
        epoch, place = divmod(rollout_step, self.rollouts_per_epoch)
        taken = set(self._order(epoch)[: place * self.prompts_per_rollout])
        whole = self.rollouts_per_epoch * self.prompts_per_rollout
        for earlier in range(epoch):
            if len(taken) == self.num_prompts:
                break
            taken.update(self._order(earlier)[:whole])
        return taken

    def _order(self, epoch: int) -> list[int]:
        return randomness.permutation(
            randomness.key(self.seed, "prompt order", epoch), self.num_prompts
        )


def _require_tokenizer(tokenizer: Any) -> int:
    """Returns the mask token's id; refuses a tokenizer without mask token or chat template."""
    if tokenizer.mask_token_id is None:
        raise ValueError(
            "tokenizer has no mask_token; it must mark masked positions; "
            "`opdlm convert import` adds it"
        )
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several templates, by name
        template = template.get("default")
    if template is None:
        raise ValueError(NO_CHAT_TEMPLATE)
    return int(tokenizer.mask_token_id)


def _check_ids(prompt: Prompt, ids: list[int], mask_token_id: int, mask_token: str) -> None:
    name = f"{prompt.where}: prompt {prompt.id}"
    if not ids:
        raise ValueError(f"{name} renders to no token; check the chat template")
    if mask_token_id in ids:
        raise ValueError(
            f"{name} contains the mask token {mask_token}, which must stand for masked positions "
            "only; remove it from the prompt"
        )


def _report_dropped(dropped: list[tuple[str, int]], total: int, limit: int) -> None:
    if not dropped:
        return
    names = ", ".join(f"{name} ({length})" for name, length in dropped[:5])
    names += ", ..." if len(dropped) > 5 else ""
    if len(dropped) == total:
        raise ValueError(
            f"max_prompt_tokens={limit} leaves none of {total} prompts; the shortest has "
            f"{min(length for _, length in dropped)} tokens; shorten them, raise the limit, or "
            "ask for fewer new tokens"
        )
    logger.warning(
        "%d of %d prompts have more than max_prompt_tokens=%d tokens and are left out: %s",
        len(dropped), total, limit, names,
    )  # fmt: skip
