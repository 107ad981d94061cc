"""A graded response as JSON, with everything that a page needs to replay its decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_opdlm.diffusion.blocks import block_start
from megatron_opdlm.evaluation.task import Answer
from megatron_opdlm.generate.display import token_texts


def choose(answers: Sequence[Answer], count: int) -> list[Answer]:
    """Returns the first `count` answers; if all are correct, the last is replaced by a wrong one.

    The wrong answer is the first one after them. A report must not show correct answers only.
    """
    chosen = list(answers[:count])
    wrong = [answer for answer in answers if not answer.correct]
    if chosen and wrong and all(answer.correct for answer in chosen):
        chosen[-1] = wrong[0]
    return chosen


def example_record(answer: Answer, tokenizer: Any) -> dict[str, Any]:
    """Returns question, verdict and, for a student's response, the record of its decoding.

    The keys of the decoding are: `prompt_tail`, texts of the prompt tokens in the first decoded
    block; `tokens`, texts of the decoded tokens; `commit_steps`, for each token the denoising step
    within its block that committed it; `passes_at`, the same step counted over the whole response;
    `num_tokens`, the number of tokens that belong to the response.
    """
    record = {
        "id": answer.question.id,
        "question": answer.question.messages[-1]["content"],
        "reference": str(answer.question.reference),
        "response": answer.text,
        "correct": answer.correct,
        "ended": answer.ended,
        "num_tokens": answer.num_tokens,
    }
    trajectory = answer.trajectory
    if trajectory is None:
        return record
    prompt_ids = trajectory.prompt_ids.tolist()
    before = trajectory.num_steps.cumsum(0) - trajectory.num_steps
    grid = trajectory.commit_grid + before.unsqueeze(1)
    tail = prompt_ids[block_start(len(prompt_ids), trajectory.block_size) :]
    return record | {
        "block_size": trajectory.block_size,
        "passes": trajectory.num_passes,
        "prompt_tail": token_texts(tokenizer, tail),
        "tokens": token_texts(tokenizer, trajectory.response_ids.tolist()),
        "commit_steps": trajectory.commit_step.tolist(),
        "passes_at": grid.flatten()[len(tail) :].tolist(),
    }
