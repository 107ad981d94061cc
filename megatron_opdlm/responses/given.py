"""Responses that the prompt file gives, for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opdlm.reporting.accounting import WorkCounters
from megatron_opdlm.responses.prompts import Prompt, PromptTokens
from megatron_opdlm.responses.source import Collected, Response, RolloutSchedule


class DataResponses:
    """A source of the responses that the prompt file gives."""

    def __init__(self, schedule: RolloutSchedule, responses: Sequence[Tensor]) -> None:
        """Binds a source to data.

        Args:
            schedule: the schedule of rollouts.
            responses: token ids [R] int64 of each response, including the end of sequence; one for
                each prompt of the schedule, in order.
        """
        self._schedule = schedule
        self._responses = {
            prompt.id: Response(ids, ended=True)
            for prompt, ids in zip(schedule.prompts, responses, strict=True)
        }

    @property
    def given(self) -> Mapping[str, Tensor]:
        """See `ResponseSource`."""
        return {name: response.token_ids for name, response in self._responses.items()}

    def collect(self, rollout_step: int) -> Collected:
        """See `ResponseSource`."""
        schedule, work = self._schedule, WorkCounters()
        trajectories = [
            schedule.on_grid(prompt, sample, self._responses[prompt.id], rollout_step)
            for prompt, sample in schedule.rows(rollout_step)
        ]
        work.add_responses(trajectories)
        return Collected(trajectories, work)


def tokenize_responses(
    prompts: Sequence[Prompt],
    kept: Sequence[PromptTokens],
    tokenizer: Any,
    *,
    path: str | Path,
    eos_token_ids: Sequence[int],
    mask_token_id: int,
) -> list[Tensor]:
    """Tokenises the given responses once, and appends the end of sequence to each.

    Args:
        prompts: prompts from `load_prompts(with_responses=True)`.
        kept: the prompts that are trained on.
        tokenizer: a transformers tokenizer.
        path: path of the prompt file, for messages.
        eos_token_ids: ids that end a response. The tokenizer's eos_token_id is appended if it is
            one of them, otherwise the first of them.
        mask_token_id: id of the mask token, which must not be in a response.

    Returns:
        Token ids [R] int64 for each prompt of `kept`.

    Raises:
        ValueError: a response contains a special token (the message names file and line), or the
            student names no end of sequence.
    """
    if not eos_token_ids:
        raise ValueError(
            f"data={path}: the student names no eos_token_id, which must end every response; add "
            "it to its config.json or generation_config.json"
        )
    own = tokenizer.eos_token_id
    end = own if own in eos_token_ids else eos_token_ids[0]
    taken = [prompts[tokens.index] for tokens in kept]
    rows = tokenizer([prompt.response for prompt in taken], add_special_tokens=False)["input_ids"]
    for prompt, ids in zip(taken, rows, strict=True):
        for role, wrong in (("mask", {mask_token_id}), ("end-of-sequence", set(eos_token_ids))):
            if found := wrong.intersection(ids):
                text = tokenizer.convert_ids_to_tokens(min(found))
                raise ValueError(
                    f"{prompt.where}: response holds the {role} token {text!r}; remove it "
                    "from the text"
                )
    return [torch.tensor([*ids, end], dtype=torch.int64) for ids in rows]
