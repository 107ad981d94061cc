"""The reference of an evaluation: transformers decodes the autoregressive teacher greedily.

The decoding uses no code of this package. So an error in the student's conversion, tokenisation or
decoding cannot be in the reference, too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.evaluation.task import Answer, EvalResult, Question, Task
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.path_kind import describe


@dataclass(frozen=True)
class Reference:
    """A transformers model and its tokenizer."""

    model: Any
    tokenizer: Any


def load_reference(hf_dir: str) -> Reference:
    """Loads a teacher on the host. Its decoding is greedy; sampling defaults are ignored.

    Call this before `Decoder.open`, so that errors of the teacher are found before any work.

    Args:
        hf_dir: Hugging Face directory; no code of it is run.

    Raises:
        ConversionError: `hf_dir` is not a Hugging Face directory, or no token ends a response.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = ModelSource.open(hf_dir)
    if not source.is_hf:
        raise ConversionError(f"teacher={hf_dir}: {describe(Path(hf_dir))}")
    source.response_ends.require(hf_dir)
    tokenizer = AutoTokenizer.from_pretrained(hf_dir, trust_remote_code=False)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(hf_dir, trust_remote_code=False).eval()
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=list(source.response_ends.ids),  # the same ids that end a student's response
        pad_token_id=tokenizer.pad_token_id,
    )
    return Reference(model, tokenizer)


@torch.no_grad()
def evaluate_teacher(
    teacher: Reference,
    task: Task,
    *,
    response_limit: int,
    enable_thinking: bool = False,
    batch_size: int = 128,
    progress: bool = False,
) -> EvalResult:
    """Decodes and grades every question of a task. Call on all ranks; each decodes a share.

    Args:
        teacher: the teacher, from `load_reference`.
        task: the questions, with their kind.
        response_limit: most response tokens.
        enable_thinking: passed to the chat template.
        batch_size: number of questions decoded at once. Questions are sorted by length, and padded
            on the left.
        progress: whether to show a progress bar.

    Returns:
        The graded answers; the same on every rank. Collectives: one gather over all ranks.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    teacher.model.to(device=torch.cuda.current_device(), dtype=dtype)
    start = time.perf_counter()
    mine = list(range(rank, task_size := len(task.questions), world_size))
    mine.sort(key=lambda index: len(task.questions[index].messages[-1]["content"]))
    answers: dict[int, Answer] = {}
    show = progress and rank == 0
    with tqdm(total=len(mine), desc=f"{task.name} teacher", disable=not show) as bar:
        for first in range(0, len(mine), batch_size):
            batch = mine[first : first + batch_size]
            questions = [task.questions[index] for index in batch]
            found = _answer(teacher, task, questions, response_limit, enable_thinking)
            answers |= dict(zip(batch, found, strict=True))
            bar.update(len(batch))
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, answers)
    everyone = {index: answer for part in parts for index, answer in part.items()}
    ordered = [everyone[index] for index in range(task_size)]
    return EvalResult(
        task=task.name,
        kind=task.kind.name,
        options=None,
        response_limit=response_limit,
        enable_thinking=enable_thinking,
        seed=0,
        answers=ordered,
        num_passes=sum(answer.num_tokens for answer in ordered),
        seconds=time.perf_counter() - start,
    )


def _answer(
    teacher: Reference,
    task: Task,
    questions: Sequence[Question],
    response_limit: int,
    enable_thinking: bool,
) -> list[Answer]:
    model, tokenizer = teacher.model, teacher.tokenizer
    inputs = tokenizer.apply_chat_template(
        [question.messages for question in questions],
        add_generation_prompt=True,
        enable_thinking=enable_thinking,
        tokenize=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    prompts = inputs["input_ids"].to(model.device)
    mask = inputs["attention_mask"].to(model.device)
    output = model.generate(prompts, attention_mask=mask, max_new_tokens=response_limit)
    responses = output[:, prompts.shape[1] :].cpu()
    stops = model.generation_config.eos_token_id
    is_stop = torch.isin(responses, torch.tensor(stops).flatten())
    answers = []
    for question, ids, stop in zip(questions, responses, is_stop, strict=True):
        ended = bool(stop.any())
        length = int(stop.nonzero()[0]) + 1 if ended else len(ids)
        text = tokenizer.decode(ids[:length].tolist(), skip_special_tokens=True)
        answers.append(task.grade(question, text, num_tokens=length, ended=ended))
    return answers
