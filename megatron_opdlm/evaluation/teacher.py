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
from megatron_opdlm.distributed.process_groups import from_main
from megatron_opdlm.evaluation.grading import grade_all
from megatron_opdlm.evaluation.labels import TEACHER
from megatron_opdlm.evaluation.result import EvalResult
from megatron_opdlm.evaluation.task import Answer, Question, Response, Task
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.path_kind import describe
from megatron_opdlm.generate.arguments import prompt_room


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

    source = open_reference(hf_dir)
    tokenizer = AutoTokenizer.from_pretrained(hf_dir, trust_remote_code=False)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(hf_dir, trust_remote_code=False).eval()
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=list(source.response_ends.ids),  # the same ids that end a student's response
        pad_token_id=tokenizer.pad_token_id,
    )
    return Reference(model, tokenizer)


def open_reference(hf_dir: str) -> ModelSource:
    """Returns the source of a teacher that `load_reference` can load.

    Raises:
        ConversionError: `hf_dir` is not a Hugging Face directory, or no token ends a response.
    """
    source = ModelSource.open(hf_dir)
    if not source.is_hf:
        raise ConversionError(f"teacher={hf_dir}: {describe(Path(hf_dir))}")
    source.response_ends.require(hf_dir)
    return source


_Said = tuple[str, int, bool]
"""Text of a response, its number of tokens, and whether it ended."""


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

    As for a student, a prompt that leaves no room for a response counts as a wrong answer.

    Args:
        teacher: the teacher, from `load_reference`.
        task: the questions.
        response_limit: most response tokens.
        enable_thinking: passed to the chat template.
        batch_size: number of questions decoded at once, sorted by length and padded on the left.
        progress: whether to show a progress bar.

    Returns:
        The graded answers; the same on every rank. Collectives: one gather over all ranks.

    Raises:
        ValueError: the response alone is too long for the model's positions.
    """
    room = prompt_room(teacher.model.config.max_position_embeddings, response_limit, 1)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    teacher.model.to(device=torch.cuda.current_device(), dtype=dtype)
    start = time.perf_counter()
    share = range(rank, len(task.questions), world_size)
    lengths = _lengths(teacher, task, share, enable_thinking)
    mine = sorted((index for index in share if lengths[index] <= room), key=lengths.__getitem__)
    found: dict[int, _Said] = {}
    show = progress and rank == 0
    with tqdm(total=len(mine), desc=f"{task.name} teacher", disable=not show) as bar:
        for first in range(0, len(mine), batch_size):
            batch = mine[first : first + batch_size]
            questions = [task.questions[index] for index in batch]
            texts = _respond(teacher, questions, response_limit, enable_thinking)
            found |= dict(zip(batch, texts, strict=True))
            bar.update(len(batch))
    responses = _gathered(task, found)
    seconds = time.perf_counter() - start
    grades = from_main(lambda: grade_all(responses, progress=show), is_main=rank == 0)
    return EvalResult(
        task=task.name,
        grader=task.grader,
        options=None,
        decoded_by=TEACHER,
        response_limit=response_limit,
        enable_thinking=enable_thinking,
        seed=0,
        answers=list(map(Answer.of, responses, grades)),
        seconds=seconds,
    )


def _gathered(task: Task, found: dict[int, _Said]) -> list[Response]:
    """Returns the responses of all ranks, in order."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    everyone = {index: said for part in parts for index, said in part.items()}
    return [_response(question, everyone.get(i)) for i, question in enumerate(task.questions)]


def _response(question: Question, said: _Said | None) -> Response:
    """Returns a response; an empty one if the prompt was too long to decode."""
    text, length, ended = said or ("", 0, False)
    return Response(
        question=question,
        text=text,
        num_tokens=length,
        num_passes=length,
        ended=ended,
        prompt_fits=said is not None,
    )


def _lengths(
    teacher: Reference, task: Task, share: Sequence[int], enable_thinking: bool
) -> dict[int, int]:
    """Returns the number of tokens of each of these prompts, of which there may be none."""
    if not share:
        return {}
    rows = teacher.tokenizer.apply_chat_template(
        [task.questions[index].messages for index in share],
        add_generation_prompt=True,
        enable_thinking=enable_thinking,
        tokenize=True,
        return_dict=False,
    )
    return dict(zip(share, map(len, rows), strict=True))


def _respond(
    teacher: Reference,
    questions: Sequence[Question],
    response_limit: int,
    enable_thinking: bool,
) -> list[_Said]:
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
    said = []
    for ids, stop in zip(responses, is_stop, strict=True):
        ended = bool(stop.any())
        length = int(stop.nonzero()[0]) + 1 if ended else len(ids)
        text = tokenizer.decode(ids[:length].tolist(), skip_special_tokens=True)
        said.append((text, length, ended))
    return said
