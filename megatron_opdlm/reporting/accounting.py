"""Tokens and FLOPs: as the paper counts them, and as they are executed.

The paper (Eq. 7) counts 2 N_teacher T + 6 N_student T FLOPs for T response tokens. More work than
this is executed: the prompt, the doubled stream, the teacher's pass, the rollout with its commits,
the LM head on the rows that need it, attention. Both numbers are counted separately.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from megatron_opdlm.diffusion.stream import Document, StreamSize, packed_size
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.distill.batching import Packing
from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.hf_config import HFConfig


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """FLOPs of a forward pass through one model, split by the quantity that they grow with."""

    body: int
    """FLOPs per stream token, of the linear layers of all transformer layers."""
    head: int
    """FLOPs per row that the LM head is applied to."""
    attention: int
    """FLOPs per visible (query, key) pair, over all layers and heads."""
    num_parameters: int
    """N of Eq. 7: all parameters of the model, with tied embeddings counted once."""

    def forward(self, *, tokens: int, head_rows: int, attention_pairs: int) -> int:
        """Returns the FLOPs of one forward pass."""
        return self.body * tokens + self.head * head_rows + self.attention * attention_pairs


NO_MODEL = ModelFlops(body=0, head=0, attention=0, num_parameters=0)


def model_flops_per_token(hf_config: HFConfig) -> ModelFlops:
    """Counts the forward FLOPs of a dense decoder. A multiply-add is two; norms are left out.

    Args:
        hf_config: hyperparameters of the model.
    """
    family = FAMILIES[hf_config.family]
    layer_matrices = sum(
        math.prod(shape)
        for entry in family.entries_for(hf_config)
        for shape in entry.transform.hf_shapes(hf_config)
        if entry.per_layer and len(shape) == 2
    )
    attention_width = hf_config.num_attention_heads * hf_config.kv_channels
    return ModelFlops(
        body=2 * hf_config.num_layers * layer_matrices,
        head=2 * hf_config.vocab_size * hf_config.hidden_size,
        attention=4 * hf_config.num_layers * attention_width,
        num_parameters=sum(map(math.prod, family.hf_shapes(hf_config).values())),
    )


@dataclass(kw_only=True)
class WorkCounters:
    """Work that all replicas have done so far: the same on every rank, and saved in checkpoints.

    Attention pairs are counted per layer, as the mask allows them, not as tiles execute them.
    Prompts that begin alike are read once if they enter a pass, or are packed, together. So the
    work depends on the data-parallel size, and that of rollouts on which replica was free.
    """

    response_tokens: int = 0
    """T of Eq. 7: tokens of the responses, including the end of sequence."""
    prompt_tokens: int = 0
    """Tokens of the prompts, counted once per response."""
    rollout_passes: int = 0
    """Forward passes of the decoding model, summed over data-parallel ranks."""
    rollout_tokens: int = 0
    """Stream tokens of these passes: prefill, denoising and commits."""
    rollout_head_rows: int = 0
    rollout_attention_pairs: int = 0
    teacher_tokens: int = 0
    """Stream tokens of the teacher's passes: for targets, and to decode its own responses."""
    teacher_head_rows: int = 0
    teacher_attention_pairs: int = 0
    student_tokens: int = 0
    """Stream tokens of the student's training passes: the doubled stream, padding included."""
    student_head_rows: int = 0
    student_attention_pairs: int = 0

    def add_rollout(
        self,
        trajectories: Iterable[Trajectory],
        *,
        passes: int,
        tokens: int,
        head_rows: int,
        attention_pairs: int,
    ) -> None:
        """Adds the decoding of responses: the trajectories, and the counts of the engine."""
        self.add_responses(trajectories)
        self.rollout_attention_pairs += attention_pairs
        self.rollout_passes += passes
        self.rollout_tokens += tokens
        self.rollout_head_rows += head_rows

    def add_responses(self, trajectories: Iterable[Trajectory]) -> None:
        """Adds responses that are trained on, from any source."""
        for trajectory in trajectories:
            self.response_tokens += trajectory.num_response_tokens
            self.prompt_tokens += len(trajectory.prompt_ids)

    def add_teacher_decoding(self, prompt_tokens: int, response_tokens: int) -> None:
        """Adds a response that the teacher decoded, as if it had been decoded alone.

        The prompt and every response token but the last enter the cache once. The LM head is
        applied to one row per response token.
        """
        num_tokens = prompt_tokens + response_tokens - 1
        self.teacher_tokens += num_tokens
        self.teacher_head_rows += response_tokens
        self.teacher_attention_pairs += num_tokens * (num_tokens + 1) // 2

    def add_teacher_step(
        self, documents: Sequence[Document], packing: Packing, *, multiple: int
    ) -> None:
        """Adds the teacher's forward passes of an optimizer step, on all its replicas.

        Args:
            documents: of the step.
            packing: which of them are packed together.
            multiple: streams are padded to a multiple of this.
        """
        for size in _stream_sizes(documents, packing, multiple, block_size=1):
            self.teacher_tokens += size.num_tokens
            self.teacher_attention_pairs += size.attention_pairs
        self.teacher_head_rows += sum(len(document.loss_rows) for document in documents)

    def add_student_step(
        self, documents: Sequence[Document], packing: Packing, *, multiple: int, block_size: int
    ) -> None:
        """Adds the student's passes, forward and backward, of an optimizer step, on all replicas.

        Args:
            documents: of the step.
            packing: which of them are packed together.
            multiple: streams are padded to a multiple of this.
            block_size: tokens per block.
        """
        for size in _stream_sizes(documents, packing, multiple, block_size):
            self.student_tokens += size.num_tokens
            self.student_attention_pairs += size.attention_pairs
        self.student_head_rows += sum(len(document.loss_rows) for document in documents)

    def add(self, other: WorkCounters) -> None:
        """Adds the work of other counters."""
        for field in fields(self):
            total = getattr(self, field.name) + getattr(other, field.name)
            setattr(self, field.name, total)

    def to_json(self) -> dict[str, int]:
        """Returns the counters by name, for the checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, int]) -> WorkCounters:
        """Returns counters from the result of `to_json`.

        Raises:
            ValueError: a counter is missing or unknown, because another version of this package
                wrote the checkpoint.
        """
        names = {field.name for field in fields(cls)}
        if names != set(values):
            different = ", ".join(sorted(names ^ set(values)))
            raise ValueError(
                f"work counters of the checkpoint differ in {different}; start a new run"
            )
        return cls(**values)


def _stream_sizes(
    documents: Sequence[Document], packing: Packing, multiple: int, block_size: int
) -> Iterator[StreamSize]:
    """Yields the sizes of the streams of all ranks."""
    for of_rank in packing:
        for run in of_rank:
            some = [documents[i] for i in run]
            yield packed_size(some, multiple=multiple, block_size=block_size)


@dataclass(frozen=True, kw_only=True)
class FlopsReport:
    """Computes the FLOPs that a run logs from its work counters."""

    student: ModelFlops
    teacher: ModelFlops
    recompute_granularity: str
    """none, selective (the backward pass runs attention again) or full (also the body)."""

    @classmethod
    def of(
        cls, student: HFConfig, teacher: HFConfig | None, recompute_granularity: str
    ) -> FlopsReport:
        """Makes the report of a run from its models' hyperparameters; a run may have no teacher."""
        return cls(
            student=model_flops_per_token(student),
            teacher=NO_MODEL if teacher is None else model_flops_per_token(teacher),
            recompute_granularity=recompute_granularity,
        )

    def paper(self, work: WorkCounters) -> int:
        """Returns the FLOPs of Eq. 7, 2 N_teacher T + 6 N_student T."""
        per_token = 2 * self.teacher.num_parameters + 6 * self.student.num_parameters
        return per_token * work.response_tokens

    def rollout(self, work: WorkCounters) -> int:
        """Returns the FLOPs of decoding: prefill, denoising passes and commits."""
        return self.student.forward(
            tokens=work.rollout_tokens,
            head_rows=work.rollout_head_rows,
            attention_pairs=work.rollout_attention_pairs,
        )

    def teacher_pass(self, work: WorkCounters) -> int:
        """Returns the FLOPs of the teacher's forward passes."""
        return self.teacher.forward(
            tokens=work.teacher_tokens,
            head_rows=work.teacher_head_rows,
            attention_pairs=work.teacher_attention_pairs,
        )

    def student_pass(self, work: WorkCounters) -> int:
        """Returns the FLOPs of the student's passes; a backward pass counts as two forward ones."""
        body_passes = 4 if self.recompute_granularity == "full" else 3
        attention_passes = 3 if self.recompute_granularity == "none" else 4
        return self.student.forward(
            tokens=body_passes * work.student_tokens,
            head_rows=3 * work.student_head_rows,
            attention_pairs=attention_passes * work.student_attention_pairs,
        )

    def metrics(self, work: WorkCounters) -> dict[str, int]:
        """Returns the totals since the start of the run, as metrics."""
        rollout, teacher = self.rollout(work), self.teacher_pass(work)
        student = self.student_pass(work)
        return {
            "perf/tokens_paper": work.response_tokens,
            "perf/tokens_rollout": work.rollout_tokens,
            "perf/tokens_teacher": work.teacher_tokens,
            "perf/tokens_student": work.student_tokens,
            "perf/flops_paper": self.paper(work),
            "perf/flops_executed": rollout + teacher + student,
            "perf/flops_rollout": rollout,
            "perf/flops_teacher": teacher,
            "perf/flops_student": student,
        }
