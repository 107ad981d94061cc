"""Evaluates a student on the questions of a task, with one decoding setting."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.distributed.process_groups import from_main
from megatron_opdlm.evaluation.grading import grade_all
from megatron_opdlm.evaluation.labels import setting_name
from megatron_opdlm.evaluation.result import EvalResult
from megatron_opdlm.evaluation.task import Answer, Response, Task
from megatron_opdlm.generate.decoder import Decoder
from megatron_opdlm.responses.prompts import PromptTokens
from megatron_opdlm.rollout.request import DecodingOptions


def evaluate(
    decoder: Decoder,
    task: Task,
    options: DecodingOptions,
    *,
    response_limit: int,
    seed: int = 0,
    enable_thinking: bool = False,
    progress: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> EvalResult:
    """Decodes and grades every question of a task. Call on all ranks with the same arguments.

    A prompt that is too long for the model counts as a wrong answer. So the number of questions is
    that of the task for every model.

    Args:
        decoder: the student.
        task: the questions.
        options: decoding options.
        response_limit: most response tokens.
        seed: seed of the sampling; greedy decoding does not depend on it.
        enable_thinking: passed to the chat template.
        progress: whether to show a progress bar.
        on_progress: called now and then with the number of prompts that are decoded.

    Returns:
        The graded answers; the same on every rank.
    """
    name = setting_name(options)
    prompts = decoder.tokenize(
        task.questions, options, response_limit=response_limit, enable_thinking=enable_thinking
    ).kept
    start = time.perf_counter()
    show = progress and decoder.parallel.is_main
    with tqdm(total=len(prompts), desc=f"{task.name} {name}", disable=not show) as bar:
        trajectories = decoder.decode(
            prompts,
            options,
            response_limit=response_limit,
            seed=seed,
            on_progress=_counter(bar, on_progress),
        )
    seconds = time.perf_counter() - start
    responses = _responses(task, prompts, trajectories, decoder.student.tokenizer)
    is_main = decoder.parallel.is_main
    grades = from_main(lambda: grade_all(responses, progress=show), is_main=is_main)
    return EvalResult(
        task=task.name,
        grader=task.grader,
        options=options,
        response_limit=response_limit,
        enable_thinking=enable_thinking,
        seed=seed,
        answers=list(map(Answer.of, responses, grades)),
        seconds=seconds,
    )


def _counter(bar: tqdm, on_progress: Callable[[int], None] | None) -> Callable[[int], None]:
    """Returns a function that shows the number of decoded prompts in a bar, and passes it on."""

    def count(done: int) -> None:
        bar.update(done - bar.n)
        if on_progress is not None:
            on_progress(done)

    return count


def _responses(
    task: Task, prompts: Sequence[PromptTokens], trajectories: Sequence[Trajectory], tokenizer: Any
) -> list[Response]:
    """Returns one response per question, in order; an empty one if its prompt was not decoded."""
    texts = tokenizer.batch_decode(
        [trajectory.text_ids.tolist() for trajectory in trajectories], skip_special_tokens=True
    )
    responses = [
        Response(
            question=question, text="", num_tokens=0, num_passes=0, ended=False, prompt_fits=False
        )
        for question in task.questions
    ]
    for prompt, trajectory, text in zip(prompts, trajectories, texts, strict=True):
        responses[prompt.index] = Response(
            question=task.questions[prompt.index],
            text=text,
            num_tokens=trajectory.num_response_tokens,
            num_passes=trajectory.num_passes,
            ended=trajectory.ended,
            trajectory=trajectory,
        )
    return responses
