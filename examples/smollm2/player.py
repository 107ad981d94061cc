"""Decodings as the page of a report replays them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decoding import Decoding
from pair import TEACHER

from megatron_opdlm.evaluation.examples import example_record
from megatron_opdlm.evaluation.graders.exact import EXACT
from megatron_opdlm.evaluation.graders.grader import Grade
from megatron_opdlm.evaluation.task import Answer, Question
from megatron_opdlm.responses.prompts import Prompt

SHOWN = 6
"""Responses of a setting that the page has."""


def page_records(
    tokenizer: Any, decoding: Decoding, prompts: Sequence[Prompt]
) -> list[dict[str, Any]]:
    """Returns the first responses with the step at which every token was committed.

    A response to an open prompt is neither right nor wrong, so `correct` is None.

    Args:
        tokenizer: tokenizer of the student.
        decoding: decoding of the prompts; none of the teacher's is shown.
        prompts: the prompts, in order.
    """
    if decoding.setting.writer == TEACHER:
        return []
    records = []
    for prompt, trajectory in list(zip(prompts, decoding.trajectories, strict=True))[:SHOWN]:
        ids = trajectory.text_ids.tolist()
        answer = Answer(
            question=Question(**vars(prompt), reference="", grader=EXACT),
            text=tokenizer.decode(ids, skip_special_tokens=True),
            grade=Grade(correct=False),
            num_tokens=len(ids),
            num_passes=trajectory.num_passes,
            ended=trajectory.ended,
            trajectory=trajectory,
        )
        record = example_record(answer, tokenizer)
        records.append(record | {"correct": None, "setting": decoding.setting.name})
    return records
