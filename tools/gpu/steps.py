"""Training steps of the survey: documents, a teacher's hidden states, a step and its reference.

Shape letters: S stream tokens, T loss rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_opdlm.config.learning import OptimizerConfig
from megatron_opdlm.diffusion.stream import Document, pack
from megatron_opdlm.diffusion.tags import make_tags
from megatron_opdlm.distill.batching import Microbatch
from megatron_opdlm.distill.step import StepRows, forward_backward
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.loss.divergence import Divergence
from megatron_opdlm.loss.fused import TeacherTarget, fused_divergence
from megatron_opdlm.model.gpt import BlockDiffusionModel, BuildOptions, training_stream_multiple
from megatron_opdlm.train.optimizer import StudentOptimizer
from tools.gpu.cases import BLOCK, MASKED_SHARE
from tools.gpu.device import generator
from tools.gpu.implementations import reference_loss
from tools.gpu.models import MASK_TOKEN, dense_hidden


def make_documents(count: int, prompt: int, response: int) -> list[Document]:
    """Doubled sequences of random tokens, MASKED_SHARE of the response masked; whole blocks."""
    of_host = torch.Generator().manual_seed(0)
    end, made = prompt + response, []
    for _ in range(count):
        clean = torch.randint(0, MASK_TOKEN, (end,), generator=of_host)
        order = torch.randperm(response, generator=of_host)
        masked = order[: round(MASKED_SHARE * response)].sort().values
        noisy = clean[prompt:].clone()
        noisy[masked] = MASK_TOKEN
        tags = [
            make_tags(0, torch.arange(end), noisy=0, block_size=BLOCK),
            make_tags(0, torch.arange(prompt, end), noisy=1, block_size=BLOCK),
        ]
        ids = torch.cat([clean, noisy])
        made.append(Document(token_ids=ids, tags=torch.cat(tags), loss_rows=end + masked))
    return made


def make_microbatch(documents: Sequence[Document], options: BuildOptions) -> Microbatch:
    """One microbatch whose loss is the mean over its rows."""
    stream = pack(documents, multiple=training_stream_multiple(options, 1))
    num_rows = len(stream.loss_rows)
    return Microbatch(
        student=stream,
        row_weight=torch.full((num_rows,), 1 / num_rows),
        num_masked=torch.ones(num_rows, dtype=torch.int64),
    )


def make_target(model: BlockDiffusionModel, num_rows: int) -> TeacherTarget:
    """A teacher's hidden states [T, D] and LM head, random, as wide as the student's."""
    head = model.head_weight()
    of_device = generator(1)
    hidden = torch.empty(num_rows, head.shape[1], device=head.device).normal_(generator=of_device)
    weight = torch.empty(head.shape, device=head.device).normal_(std=0.02, generator=of_device)
    return TeacherTarget(*(x.to(torch.bfloat16).to(head.dtype) for x in (hidden, weight)))


def make_optimizer(model: BlockDiffusionModel) -> StudentOptimizer:
    """The student in training."""
    return StudentOptimizer(
        model,
        OptimizerConfig(lr_warmup_steps=1),
        use_distributed_optimizer=True,
        overlap_grad_reduce=False,
        decay_steps=100,
    )


def gradient_step(
    student: StudentOptimizer,
    microbatch: Microbatch,
    target: TeacherTarget,
    parallel: ParallelState,
) -> StepRows:
    """Forward and backward pass of an optimizer step, as the trainer runs it."""
    student.zero_grad()
    return forward_backward(
        student.ddp,
        [microbatch],
        [target],
        parallel,
        divergence=Divergence(),
        mask_token_id=MASK_TOKEN,
    )


def dense_step(
    model: BlockDiffusionModel, microbatch: Microbatch, target: TeacherTarget, mask: Tensor
) -> float:
    """The loss of a step by dense attention and PyTorch's loss; gradients go to `.grad`.

    Args:
        model: not wrapped.
        microbatch: on the host.
        target: of its rows.
        mask: [S, S] bool, see `models.DenseAttention`.
    """
    device = torch.cuda.current_device()
    model.zero_grad(set_to_none=True)
    with reference_loss():
        loss, _ = fused_divergence(
            dense_hidden(model, microbatch.student.to(device), mask),
            model.head_weight(),
            target,
            microbatch.row_weight.to(device),
            Divergence(),
            vocab_size=model.vocab_size_unpadded,
            mask_token_id=MASK_TOKEN,
        )
        loss.backward()
    return float(loss.detach())
