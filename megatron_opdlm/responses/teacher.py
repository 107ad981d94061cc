"""Responses of the teacher. A rollout that needs them first decodes them; others read a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatron_opdlm.config.run import Config
from megatron_opdlm.diffusion import randomness
from megatron_opdlm.distill.student import Student
from megatron_opdlm.distill.teacher import Teacher
from megatron_opdlm.distributed.process_groups import from_main
from megatron_opdlm.reporting.accounting import WorkCounters
from megatron_opdlm.responses.file import ResponseFile, ResponseKey
from megatron_opdlm.responses.prompts import PromptTokens
from megatron_opdlm.responses.source import Collected, Response, RolloutSchedule
from megatron_opdlm.responses.student import build_engine, decode
from megatron_opdlm.rollout.decodable import Decodable
from megatron_opdlm.rollout.decoding_memory import DecodingMemory
from megatron_opdlm.rollout.engine import RolloutEngine
from megatron_opdlm.rollout.request import DecodingOptions, Request

logger = logging.getLogger(__name__)


class TeacherResponses:
    """A source of the teacher's responses. Each prompt and sample has one, in all rollouts."""

    def __init__(
        self,
        schedule: RolloutSchedule,
        engine: RolloutEngine,
        teacher: Teacher,
        file: ResponseFile,
    ) -> None:
        """Binds a source to a teacher. Call on all ranks.

        Args:
            schedule: the schedule of rollouts.
            engine: decoding engine of the teacher.
            teacher: the teacher.
            file: file of responses; only rank 0 reads and writes it.

        Raises:
            ValueError: the file is not a file of responses, or has other settings.
        """
        self._schedule, self._engine, self._teacher = schedule, engine, teacher
        self._file = file
        from_main(file.check, is_main=teacher.parallel.is_main)

    @property
    def given(self) -> Mapping[str, Tensor]:
        """See `ResponseSource`."""
        return {}

    def collect(self, rollout_step: int) -> Collected:
        """See `ResponseSource`.

        The decoding of a response is counted in the rollout that first takes its prompt, even if
        the file already had the response. So runs that share a file can be compared, and a resumed
        run has the same counts as one that was never interrupted.
        """
        rows = self._schedule.rows(rollout_step)
        keys = [ResponseKey.of(prompt.id, sample, prompt.ids) for prompt, sample in rows]
        parallel = self._teacher.parallel
        is_main = parallel.is_main
        found = from_main(lambda: self._file.read(keys), is_main=is_main)
        missing = {
            key: self._request(*row)
            for key, row in zip(keys, rows, strict=True)
            if key not in found
        }
        if missing:
            requests = list(missing.values())
            with self._teacher.on_device():
                decoded, _ = decode(self._engine, requests, parallel, "teacher's responses")
            new = {
                key: Response(t.text_ids, t.ended) for key, t in zip(missing, decoded, strict=True)
            }
            found |= from_main(lambda: self._file.add(new), is_main=is_main)
        responses = [found[key] for key in keys]
        trajectories = [
            self._schedule.on_grid(prompt, sample, response, rollout_step)
            for (prompt, sample), response in zip(rows, responses, strict=True)
        ]
        work = WorkCounters()
        work.add_responses(trajectories)
        is_first = self._schedule.first_uses(rollout_step)
        for (prompt, _), response, first in zip(rows, responses, is_first, strict=True):
            if first:
                work.add_teacher_decoding(len(prompt.ids), len(response.token_ids))
        return Collected(trajectories, work)

    def _request(self, prompt: PromptTokens, sample: int) -> Request:
        schedule = self._schedule
        return Request(
            prompt_id=prompt.id,
            sample=sample,
            prompt_ids=prompt.ids,
            response_limit=schedule.config.max_response_tokens.end,
            key=randomness.key(schedule.seed, "teacher", prompt.id, sample),
        )


def teacher_decodable(config: Config, teacher: Teacher, student: Student) -> Decodable:
    """Returns the teacher as engines use it.

    A response ends at the student's end tokens, and never contains the student's mask token.
    """
    return Decodable(
        model=teacher.model,
        parallel=teacher.parallel,
        mask_token_id=student.mask_token_id,
        eos_token_ids=student.description.config.eos_token_ids,
        stream_multiple=teacher.pass_multiple,
        is_causal=True,
        # The teacher decodes every prompt once, and weights that come from host memory have new
        # addresses every time.
        memory=DecodingMemory(keep=bool(config.rollout.keep_kv_cache) and teacher.host is None),
    )


def teacher_engine(config: Config, teacher: Teacher, student: Student) -> RolloutEngine:
    """Makes the engine that decodes with the teacher, token by token."""
    rollout = config.rollout
    options = DecodingOptions(
        block_size=1,
        denoising_steps=1,
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
    )
    return build_engine(teacher_decodable(config, teacher, student), options, rollout)


def response_settings(config: Config, teacher: Teacher, student: Student) -> dict[str, Any]:
    """Returns the settings that all responses of a file depend on, besides prompt and sample.

    Parallel layout and batch size are not among them: they change only the rounding.

    Args:
        config: resolved configuration.
        teacher: the teacher that writes the responses.
        student: the student, whose end tokens and mask token apply.
    """
    rollout = config.rollout
    is_cut = teacher.vocab_size < teacher.description.config.vocab_size
    return {
        **({"vocab_size": teacher.vocab_size} if is_cut else {}),
        "teacher": str(teacher.fingerprint),
        "tokenizer": teacher.description.tokenizer_fingerprint,
        "params_dtype": config.model.params_dtype,
        "fp8": config.model.teacher_fp8,
        "fp8_recipe": config.model.fp8_recipe,
        "eos_token_ids": list(student.description.config.eos_token_ids),
        "mask_token_id": student.mask_token_id,
        "temperature": rollout.temperature,
        "top_k": rollout.top_k,
        "top_p": rollout.top_p,
        "response_limit": rollout.max_response_tokens.end,
        "seed": config.train.seed,
    }
